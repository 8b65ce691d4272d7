"""Depth attention against the paper's own form (stack, RMSNorm the keys, einsum), for every backend without a GPU."""

import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from attnres import ops
from attnres.ops.eager import Eager
from attnres.ops.reference import Reference

from .native import COMPILED, require_native


def straightforward(query, sources, key_norm, eps):
    values = torch.stack(list(sources))
    keys = torch.nn.functional.rms_norm(values, values.shape[-1:], key_norm, eps)
    weights = torch.einsum("d,n...d->n...", query, keys).softmax(0)
    return torch.einsum("n...,n...d->...d", weights, values), weights


def inputs(num_sources, shape=(3, 5), dim=17, dtype=torch.float64, grad=True, magnitude=1.0):
    generator = torch.Generator().manual_seed(num_sources + dim)
    draw = lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64)  # noqa: E731
    query, key_norm = draw(dim), 1 + 0.3 * draw(dim)
    sources = [magnitude * (0.2 + i) * draw(*shape, dim) for i in range(num_sources)]
    return [t.to(dtype).requires_grad_(grad) for t in (query, key_norm, *sources)]


@pytest.fixture(params=["reference", "eager", "native"])
def backend(request):
    if request.param == "native":
        require_native()
    ops.set_backend(request.param)
    yield request.param
    ops.set_backend("auto")


@pytest.mark.parametrize("num_sources", [1, 2, 9])
@pytest.mark.parametrize("shape", [(4,), (3, 5), (2, 1, 3)])
@pytest.mark.parametrize("eps", [0.0, 1e-6, 0.5])
def test_equals_the_straightforward_form_and_every_gradient(backend, num_sources, shape, eps):
    query, key_norm, *sources = leaves = inputs(num_sources, shape)
    h, weights = ops.depth_attention(query, sources, key_norm, eps, return_weights=True)
    expected, expected_weights = straightforward(query, sources, key_norm, eps)
    torch.testing.assert_close(h, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(weights, expected_weights, rtol=1e-12, atol=1e-12)
    direction = torch.randn_like(h)
    got, want = torch.autograd.grad(h, leaves, direction), torch.autograd.grad(expected, leaves, direction)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-11, atol=1e-11)


def results(op, leaves, direction):
    h = op(leaves[0], leaves[2:], leaves[1])
    return [h, *torch.autograd.grad(h, leaves, direction)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_error_is_at_most_twice_the_plain_forms(backend, dtype):
    leaves = inputs(6, (64,), 96, dtype)
    direction = torch.randn(64, 96, generator=torch.Generator().manual_seed(1)).to(dtype)
    exact_leaves = [leaf.detach().double().requires_grad_() for leaf in leaves]
    exact = results(lambda q, s, g: straightforward(q, s, g, 1e-6)[0], exact_leaves, direction.double())
    plain = results(lambda q, s, g: straightforward(q, s, g, 1e-6)[0], leaves, direction)
    for got, rival, want in zip(results(ops.depth_attention, leaves, direction), plain, exact, strict=True):
        assert got.dtype == dtype
        error, rivals = (got.double() - want).norm(), (rival.double() - want).norm()
        assert error <= 2 * rivals + 1e-6 * want.norm()


def test_statistics_stay_in_fp32_under_autocast(backend):
    query, key_norm, *sources = inputs(4, (32,), 64, torch.float32, grad=False)
    plain = ops.depth_attention(query, sources, key_norm)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(ops.depth_attention(query, sources, key_norm), plain, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("num_queries", [1, 4])
@pytest.mark.parametrize("num_sources", [1, 5])
def test_two_phases_equal_single_reads(backend, num_queries, num_sources):
    leaves = inputs(num_sources + 1)
    partial, sources = leaves[2], leaves[3:]
    generator = torch.Generator().manual_seed(7)
    queries = torch.randn(num_queries, 17, generator=generator, dtype=torch.float64, requires_grad=True)
    norms = (1 + torch.rand(num_queries, 17, generator=generator, dtype=torch.float64)).requires_grad_()
    outs, lses = ops.inter_block(queries, sources, norms)
    merged = [ops.merge(q, partial, g, o, z, scale=1.5) for q, g, o, z in zip(queries, norms, outs, lses, strict=True)]
    single = [ops.depth_attention(q, [*sources, partial], g, scale=1.5) for q, g in zip(queries, norms, strict=True)]
    first = [ops.depth_attention(q, sources, g) for q, g in zip(queries, norms, strict=True)]
    got, want = torch.stack([*merged, *outs]), torch.stack([*single, *first])
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    direction = torch.randn_like(got)
    for g, w in zip(
        torch.autograd.grad(got, [queries, norms, partial, *sources], direction),
        torch.autograd.grad(want, [queries, norms, partial, *sources], direction),
        strict=True,
    ):
        torch.testing.assert_close(g, w, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("norm", [None, "plain", "weighted"])
@pytest.mark.parametrize("first", [True, False])
def test_fused_forms_are_their_parts(backend, norm, first):
    query, key_norm, partial, update, *sources = inputs(5, grad=False)
    weight = torch.linspace(0.5, 2, 17, dtype=torch.float64) if norm == "weighted" else None
    pair = None if norm is None else (weight, 1e-3)
    normed = lambda h: h if pair is None else torch.nn.functional.rms_norm(h, (17,), weight, 1e-3)  # noqa: E731
    read = normed(3 * ops.depth_attention(query, sources, key_norm))
    torch.testing.assert_close(ops.read_norm(query, sources, key_norm, 1e-6, scale=3.0, norm=pair), read)
    x, handed_on = ops.read_norm_chained(query, sources, key_norm, 1e-6, scale=3.0, norm=pair)
    torch.testing.assert_close([x, *handed_on], [read, *sources])
    (out,), (lse,) = ops.inter_block(query[None], sources, key_norm[None])
    total = update if first else partial + update
    new, x = ops.merge_norm(query, None if first else partial, update, key_norm, out, lse, 1e-6, scale=2.0, norm=pair)
    torch.testing.assert_close([new, x], [total, normed(2 * ops.depth_attention(query, [*sources, total], key_norm))])
    torch.testing.assert_close(ops.add_norm(partial, update, norm=pair), (partial + update, normed(partial + update)))


def test_extreme_inputs_stay_finite(backend):
    query, key_norm, *sources = inputs(3, dtype=torch.float32, grad=False)
    zero = [torch.zeros_like(sources[0])] * 3
    assert torch.equal(ops.depth_attention(query, zero, key_norm), zero[0])
    huge = [1e18 * s for s in sources]
    assert ops.depth_attention(query, huge, key_norm).isfinite().all()
    # a logit 1e4 above the rest: the read is that source
    spike = [sources[0], 1e4 * query.expand_as(sources[1])]
    torch.testing.assert_close(ops.depth_attention(1e4 * query, spike, key_norm.abs()), spike[1])


def test_sources_are_not_changed_and_autograd_is_second_order(backend):
    query, key_norm, *sources = inputs(2, (2,), 3)
    before = [s.detach().clone() for s in sources]
    assert torch.autograd.gradcheck(lambda q, g, *s: ops.depth_attention(q, s, g, 1e-3), (query, key_norm, *sources))
    assert all(torch.equal(b, s) for b, s in zip(before, sources, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sources": []}, "sources is empty"),
        ({"sources": torch.zeros(2, 3, 17)}, "sequence of tensors"),
        ({"sources": [torch.zeros(3, 17), torch.zeros(4, 17)]}, r"share one shape.*sources\[1\]"),
        ({"sources": [torch.zeros(3, 17), torch.zeros(3, 17, dtype=torch.float64)]}, "dtype"),
        ({"sources": [torch.zeros(3, 17), torch.zeros(3, 17, device="meta")]}, "device"),
        ({"sources": [torch.zeros(3, 17, dtype=torch.int64)]}, "floating-point"),
        ({"query": torch.zeros(16)}, "query must have shape 17"),
        ({"key_norm": torch.zeros(1, 17)}, "key_norm must have shape 17"),
        ({"eps": -1.0}, "eps must be zero or positive"),
    ],
)
def test_bad_arguments_are_named(change, message):
    arguments = {"query": torch.zeros(17), "sources": [torch.zeros(3, 17)], "key_norm": torch.ones(17), "eps": 1e-6}
    with pytest.raises(ValueError, match=message):
        ops.depth_attention(**{**arguments, **change})


def test_backend_choice_is_checked_and_announced_once(caplog, monkeypatch):
    from attnres.ops import dispatch

    with pytest.raises(ValueError, match="one of auto, reference, eager, native, triton"):
        ops.set_backend("cuda")
    assert ops.backend() == "auto"
    monkeypatch.setattr(dispatch, "_announced", set())
    query, key_norm, *sources = inputs(2, grad=False)
    with caplog.at_level("INFO", "attnres"):
        ops.depth_attention(query, sources, key_norm)
        ops.depth_attention(query, sources, key_norm)
    messages = [record.message for record in caplog.records if "compiled" not in record.message]
    if COMPILED:
        assert messages == ["depth attention runs on the native backend (cpu, torch.float64)"]
    else:
        assert len(messages) == 1 and messages[0].startswith("depth attention runs on the eager backend: the native")


@pytest.mark.parametrize("installed", [True, False])
def test_a_backend_that_declines_says_why_once(installed, caplog, monkeypatch):
    """On a GPU, which fake tensors stand for."""
    from attnres.ops import dispatch

    if installed:
        pytest.importorskip("triton")
    monkeypatch.setattr(dispatch, "TRITON_INSTALLED", installed)
    monkeypatch.setattr(dispatch, "_announced", set())
    with caplog.at_level("INFO", "attnres"), FakeTensorMode():
        for width, dtype in ((9000, torch.float32), (9000, torch.float32), (16, torch.float64)):
            assert type(dispatch.select(torch.empty(2, width, dtype=dtype, device="cuda"), 3)) is Eager
    reasons = ["Triton is not installed"]
    if installed:
        reasons = [
            "the Triton backend takes a width of at most 8192; sources have 9000",
            "the Triton backend takes bfloat16, float16 and float32 sources; these are torch.float64",
        ]
    prefix = "depth attention runs on the eager backend: "
    assert [record.message for record in caplog.records] == [prefix + reason for reason in reasons]


def test_the_environment_chooses_and_triton_is_not_needed():
    script = """if True:
        import importlib, os, sys
        sys.modules["triton"] = None
        os.environ["ATTNRES_BACKEND"] = "reference"
        from attnres import ops
        from attnres.ops import dispatch
        print(ops.backend())
        for name in ("triton", "eager"):
            os.environ["ATTNRES_BACKEND"] = name
            try:
                print(importlib.reload(dispatch).backend())
            except ValueError as error:
                print(error)
    """
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "reference",
        "backend 'triton' needs Triton, which is not installed; use 'auto' or install triton",
        "eager",
    ]


def test_a_backend_of_ones_own_serves_every_op_and_may_decline():
    class Counting(Reference):
        calls = 0

        def declines(self, source, num_sources):
            return "at most three" if num_sources > 3 else None

        def read_with_weights(self, *arguments):
            self.calls += 1
            return super().read_with_weights(*arguments)

    own, sources = Counting(), [torch.randn(2, 8) for _ in range(3)]
    query, key_norm = torch.randn(8), torch.ones(8)
    ops.set_backend(own)
    try:
        assert ops.backend() is own
        ops.read_norm(query, sources, key_norm, 1e-6, norm=(None, 1e-6))
        ops.read_norm_chained(query, sources, key_norm, 1e-6)
        assert own.calls == 2
        with torch.no_grad(), pytest.raises(ValueError, match="query"):
            ops.read_norm(torch.randn(9), sources, key_norm, 1e-6)
        with pytest.raises(ValueError, match="at most three"):
            ops.depth_attention(query, [*sources, sources[0]], key_norm)
    finally:
        ops.set_backend("auto")
