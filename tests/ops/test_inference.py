"""The forms without gradients against the reference in fp64: for few tokens in one piece, for many in chunks."""

import pytest
import torch

from attnres import ops
from attnres.ops import dispatch, no_grad
from attnres.ops.eager import Eager
from attnres.ops.formulas import statistics_dtype
from attnres.ops.no_grad import NoGrad
from attnres.ops.reference import Reference

EPS = 1e-3
reference, eager, inference = Reference(), Eager(), NoGrad()


@pytest.fixture(params=[1 << 19, 250], ids=["whole", "chunks"])
def chunk(request, monkeypatch):
    monkeypatch.setattr(no_grad, "CHUNK", request.param)
    monkeypatch.setattr(no_grad, "FEW", 0 if request.param == 250 else no_grad.FEW)


def draw(shape, n, queries, dim):
    """Queries and key norms [S, D], a norm's weight [D], a partial sum, an update and n sources, in fp64."""
    generator = torch.Generator().manual_seed(n + dim)
    randn = lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64)  # noqa: E731
    rows = [(0.3 + i) * randn(*shape, dim) for i in range(n + 2)]
    return randn(queries, dim), 1 + 0.3 * randn(queries, dim), 1 + 0.3 * randn(dim), *rows


def everything(backend, dtype, inputs, with_norm, scale=3.0):
    """Every result of the functions of a backend, one after the other."""
    queries, key_norms, weight, partial, update, *sources = (t.to(dtype) for t in inputs)
    norm = (weight, 1e-2) if with_norm else None
    q, g = queries[0], key_norms[0]
    outs, lses = backend.inter_block(queries, sources, key_norms, EPS)
    results = [torch.stack(outs), torch.stack(lses)]
    for before in (None, partial):
        results += backend.merge_norm(q, before, update, g, outs[0], lses[0], EPS, scale=scale, norm=norm)
    results.append(backend.merge_norm(q, None, partial, g, outs[0], lses[0], EPS, scale=scale)[1])
    results.append(backend.read_norm(q, sources, g, EPS, scale=scale, norm=norm))
    results += backend.read_with_weights(q, sources, g, EPS, scale)
    results += backend.add_norm(partial, update, norm=norm)
    return results


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("n", [1, 2, 9])
@pytest.mark.parametrize(("shape", "dim", "queries"), [((1, 1), 96, 6), ((3, 5), 17, 1), ((2, 1, 13), 33, 4)])
def test_error_is_at_most_twice_the_references(chunk, dtype, n, shape, dim, queries):
    inputs = draw(shape, n, queries, dim)
    inputs = tuple(t.to(dtype).double() for t in inputs)
    truth = everything(reference, torch.float64, inputs, with_norm=True)
    plain = everything(reference, dtype, inputs, with_norm=True)
    got = everything(inference, dtype, inputs, with_norm=True)
    floor = 16 * torch.finfo(torch.float32).eps  # logits are of that size, and one token's rounding is a lottery
    for found, rival, want in zip(got, plain, truth, strict=True):
        assert found.dtype == rival.dtype and found.shape == rival.shape
        error, rivals = (found.double() - want).norm(), (rival.double() - want).norm()
        assert error <= 2 * rivals + floor * want.norm()


@torch.no_grad()
@pytest.mark.parametrize("shape", [(), (1,), (0, 4), (7, 3)])
@pytest.mark.parametrize("with_norm", [False, True])
def test_any_leading_dimensions(chunk, shape, with_norm):
    inputs = draw(shape, 3, 2, 12)
    results = (everything(backend, torch.float64, inputs, with_norm) for backend in (inference, reference))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_layouts_and_inputs_are_left_as_they_are(chunk):
    inputs = draw((4, 6), 3, 2, 10)
    turned = tuple(t if t.dim() < 3 else t.transpose(0, 1).contiguous().transpose(0, 1) for t in inputs)
    before = [t.clone() for t in turned]
    results = (everything(inference, torch.float64, i, True) for i in (turned, inputs))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)
    assert all(torch.equal(t, kept) for t, kept in zip(turned, before, strict=True))


@torch.no_grad()
def test_statistics_stay_in_fp32_under_autocast(chunk):
    inputs = draw((2, 9), 4, 3, 64)
    plain = everything(inference, torch.float32, inputs, with_norm=True)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(everything(inference, torch.float32, inputs, with_norm=True), plain)


@torch.no_grad()
def test_extreme_inputs(chunk):
    queries, key_norms, _, partial, _update, *sources = draw((2, 9), 3, 2, 17)
    zero = [torch.zeros_like(sources[0])] * 3
    assert torch.equal(inference.read_norm(queries[0], zero, key_norms[0], 1e-6), zero[0])
    outs, lses = inference.inter_block(1e4 * queries, sources, key_norms, 1e-6)
    spike = 1e6 * (queries[0] * key_norms[0]).expand_as(
        partial
    )  # a logit far above the others: the read is that source
    for partial, read in ((spike, spike), (-spike, outs[0])):
        _, merged = inference.merge_norm(1e4 * queries[0], None, partial, key_norms[0], outs[0], lses[0], 1e-6)
        torch.testing.assert_close(merged, read)
    everything_else = [*outs, *lses, inference.read_norm(queries[0], [1e18 * s for s in sources], key_norms[0], 1e-6)]
    assert all(t.isfinite().all() for t in everything_else)


def test_folded_queries_need_no_key_norm():
    for dtype in (torch.float64, torch.bfloat16):
        queries, key_norms, _, partial, update, *sources = (t.to(dtype) for t in draw((2, 3), 3, 2, 16))
        folded = ops.fold(queries, key_norms, dtype)
        assert folded.dtype == statistics_dtype(dtype)
        for backend in (reference, eager, inference):
            outs, lses = backend.inter_block(queries, sources, key_norms, EPS)
            torch.testing.assert_close(backend.inter_block(folded, sources, None, EPS), (outs, lses))
            arguments = dict(scale=2.0, norm=None)
            got = backend.merge_norm(folded[0], partial, update, None, outs[0], lses[0], EPS, **arguments)
            want = backend.merge_norm(queries[0], partial, update, key_norms[0], outs[0], lses[0], EPS, **arguments)
            torch.testing.assert_close(got, want)


def test_they_serve_where_gradients_are_off_and_nothing_is_compiled(monkeypatch):
    row = torch.zeros(2, 3)
    monkeypatch.setattr(dispatch, "_choice", "eager")
    assert type(dispatch.select(row)) is Eager
    with torch.inference_mode():
        assert type(dispatch.select(row)) is NoGrad
    with torch.no_grad():
        assert type(dispatch.select(row)) is NoGrad
        compiled = torch.compile(lambda x: ops.depth_attention(x[0], [x, x + 1], x[1]), backend="eager", fullgraph=True)
        rows = torch.randn(2, 3)
        torch.testing.assert_close(compiled(rows), ops.depth_attention(rows[0], [rows, rows + 1], rows[1]))
