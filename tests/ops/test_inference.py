"""The forms without gradients against the reference in fp64: for few tokens in one piece, for many in chunks."""

import pytest
import torch

from attnres import ops
from attnres.ops import dispatch, eager, reference
from attnres.ops import no_grad as inference

EPS = 1e-3


@pytest.fixture(params=[1 << 19, 250], ids=["whole", "chunks"])
def chunk(request, monkeypatch):
    monkeypatch.setattr(inference, "CHUNK", request.param)
    monkeypatch.setattr(inference, "FEW", 0 if request.param == 250 else inference.FEW)


def draw(shape, n, queries, dim):
    """Queries and key norms [S, D], a norm's weight [D], a partial sum, an update and n sources, in fp64."""
    generator = torch.Generator().manual_seed(n + dim)
    randn = lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64)  # noqa: E731
    rows = [(0.3 + i) * randn(*shape, dim) for i in range(n + 2)]
    return randn(queries, dim), 1 + 0.3 * randn(queries, dim), 1 + 0.3 * randn(dim), *rows


def everything(module, dtype, inputs, with_norm, scale=3.0):
    """Every result of the functions of a backend, one after the other."""
    queries, key_norms, weight, partial, update, *sources = (t.to(dtype) for t in inputs)
    norm = (weight, 1e-2) if with_norm else None
    q, g = queries[0], key_norms[0]
    outs, lses = module.inter_block(queries, sources, key_norms, EPS)
    results = [torch.stack(outs), torch.stack(lses)]
    for before in (None, partial):
        results += module.merge_norm(q, before, update, g, outs[0], lses[0], EPS, scale=scale, norm=norm)
    results.append(module.merge(q, partial, g, outs[0], lses[0], EPS, scale=scale))
    results.append(module.read_norm(q, sources, g, EPS, scale=scale, norm=norm))
    results += module.depth_attention(q, sources, g, EPS, return_weights=True, scale=scale)
    results += module.add_norm(partial, update, norm=norm)
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
    results = (everything(module, torch.float64, inputs, with_norm) for module in (inference, reference))
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
    assert torch.equal(inference.depth_attention(queries[0], zero, key_norms[0]), zero[0])
    outs, lses = inference.inter_block(1e4 * queries, sources, key_norms)
    spike = 1e6 * (queries[0] * key_norms[0]).expand_as(
        partial
    )  # a logit far above the others: the read is that source
    torch.testing.assert_close(inference.merge(1e4 * queries[0], spike, key_norms[0], outs[0], lses[0]), spike)
    torch.testing.assert_close(inference.merge(1e4 * queries[0], -spike, key_norms[0], outs[0], lses[0]), outs[0])
    everything_else = [*outs, *lses, inference.depth_attention(queries[0], [1e18 * s for s in sources], key_norms[0])]
    assert all(t.isfinite().all() for t in everything_else)


def test_folded_queries_need_no_key_norm():
    for dtype in (torch.float64, torch.bfloat16):
        queries, key_norms, _, partial, update, *sources = (t.to(dtype) for t in draw((2, 3), 3, 2, 16))
        folded = ops.fold(queries, key_norms, dtype)
        assert folded.dtype == reference.statistics_dtype(dtype)
        for module in (reference, eager, inference):
            outs, lses = module.inter_block(queries, sources, key_norms, EPS)
            torch.testing.assert_close(module.inter_block(folded, sources, None, EPS), (outs, lses))
            arguments = dict(scale=2.0, norm=None)
            got = module.merge_norm(folded[0], partial, update, None, outs[0], lses[0], EPS, **arguments)
            want = module.merge_norm(queries[0], partial, update, key_norms[0], outs[0], lses[0], EPS, **arguments)
            torch.testing.assert_close(got, want)


def test_they_serve_where_gradients_are_off_and_nothing_is_compiled():
    row = torch.zeros(2, 3)
    assert dispatch.select(row) is eager
    with torch.inference_mode():
        assert dispatch.select(row) is inference
    with torch.no_grad():
        assert dispatch.select(row) is inference
        compiled = torch.compile(lambda x: ops.depth_attention(x[0], [x, x + 1], x[1]), backend="eager", fullgraph=True)
        rows = torch.randn(2, 3)
        torch.testing.assert_close(compiled(rows), ops.depth_attention(rows[0], [rows, rows + 1], rows[1]))
