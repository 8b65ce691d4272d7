"""The ops under torch.compile: values and gradients are those without it, with the oldest torch that is allowed too."""

import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from attnres import ops

SOURCES = [(0, 1), (0, 1, 0), (1, 1), (0,)]
"""Indices of two tensors: a layer that hands its input on makes one tensor two sources."""


@pytest.fixture(params=["reference", "eager"])
def chosen(request):
    ops.set_backend(request.param)
    torch.compiler.reset()
    yield request.param
    ops.set_backend("auto")


def leaves(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()  # noqa: E731
    return [draw(8), draw(8), draw(3, 8), draw(3, 8)]


def assert_same_compiled(function, tensors):
    """Every result of `function` and every gradient, compiled as one graph."""
    compiled = torch.compile(function, backend="eager", fullgraph=True)
    want, got = function(*tensors), compiled(*tensors)
    torch.testing.assert_close(got, want)
    generator = torch.Generator().manual_seed(1)
    directions = [torch.randn(h.shape, generator=generator, dtype=torch.float64).to(h.dtype) for h in want]
    for form in ((want, got), (want[:1], got[:1])):  # all results, and the first alone
        unused = {"retain_graph": True, "materialize_grads": True}
        gradients = [torch.autograd.grad(hs, tensors, directions[: len(hs)], **unused) for hs in form]
        torch.testing.assert_close(*reversed(gradients))


@pytest.mark.parametrize("order", SOURCES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_read_and_its_gradients(chosen, order, dtype):
    def read(query, key_norm, a, b):
        sources = [(a, b)[i] for i in order]
        return (ops.depth_attention(query, sources, key_norm, 1e-3, scale=2.0),)

    assert_same_compiled(read, leaves(dtype))


@pytest.mark.parametrize("order", SOURCES)
@pytest.mark.parametrize("weighted", [True, False])
def test_the_forms_that_residual_connections_use(chosen, order, weighted):
    def forms(query, key_norm, a, b):
        sources, norm = [(a, b)[i] for i in order], (key_norm if weighted else None, 1e-3)
        x, handed_on = ops.read_norm_chained(query, sources, key_norm, 1e-3, scale=2.0, norm=norm)
        (out,), (lse,), handed_on = ops.inter_block_chained(query[None], handed_on, key_norm[None], 1e-3)
        total, merged = ops.merge_norm(query, sources[0], sources[-1], key_norm, out, lse, 1e-3, norm=norm)
        first, second = ops.merge_norm(query, None, sources[0], key_norm, out, lse, 1e-3, norm=norm)
        return x, total, merged, first, second, *ops.add_norm(handed_on[0], handed_on[-1], norm=norm)

    assert_same_compiled(forms, leaves())


def test_a_query_that_is_a_source(chosen):
    assert_same_compiled(lambda q, g, *_: (ops.read_norm_chained(q, [g, q], None, 1e-3)[0],), leaves()[:2])


def test_no_search_for_packages_is_traced():
    """On a GPU, which fake tensors stand for; torch 2.11 fails at it and later ones warn."""
    pytest.importorskip("triton")
    torch.compiler.reset()
    read = torch.compile(lambda q, a: ops.depth_attention(q, [a, a], q), backend="eager", fullgraph=True)
    with warnings.catch_warnings(), FakeTensorMode():
        warnings.simplefilter("error")
        assert read(torch.empty(8, device="cuda"), torch.empty(3, 8, device="cuda")).is_cuda
