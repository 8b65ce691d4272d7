"""Reads by queries of a part of the width, and sums with given weights. The truth is written out."""

import pytest
import torch

from attnres import ops
from attnres.ops import dispatch, formulas
from attnres.ops.eager import Eager
from attnres.ops.native.backend import NATIVE
from attnres.ops.reference import Reference

from .native import COMPILED

BACKENDS = ["reference", "eager", pytest.param("native", marks=pytest.mark.skipif(not COMPILED, reason="no compiler"))]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=BACKENDS)
def backend(request):
    ops.set_backend(request.param)
    yield request.param
    ops.set_backend("auto")


def draw(n, shape, dim, query, dtype=torch.float64):
    """A query, its key norm, the weight of a norm and n sources, all leaves."""
    generator = torch.Generator().manual_seed(n + dim)
    randn = lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64)  # noqa: E731
    leaves = [randn(*query), 1 + 0.3 * randn(*query), 1 + 0.3 * randn(dim)]
    return [t.to(dtype).requires_grad_() for t in (*leaves, *((0.3 + i) * randn(*shape, dim) for i in range(n)))]


def written_out(query, key_norm, sources, eps, scale):
    """(h, weights) as papers write it: normalised keys, then softmax over depth."""
    stack = torch.stack(sources)
    keys = stack.unflatten(-1, query.shape) if query.dim() > 1 else stack[..., -len(query) :]
    keys = keys * (keys.square().mean(-1, keepdim=True) + eps).rsqrt() * key_norm
    weights = (keys * query).sum(-1).softmax(0)
    values = stack.unflatten(-1, query.shape) if query.dim() > 1 else stack
    h = (weights.unsqueeze(-1) * values).sum(0) * scale
    return (h.flatten(-2) if query.dim() > 1 else h), weights


def gradients(results, leaves):
    generator = torch.Generator().manual_seed(1)
    into = [torch.randn(r.shape, generator=generator, dtype=torch.float64).to(r.dtype) for r in results]
    return [*results, *torch.autograd.grad(results, leaves, into, materialize_grads=True)]


SHAPES = [((), 12), ((3,), 12), ((2, 1, 65), 12), ((0, 4), 12), ((5,), 34)]
QUERIES = [(2, 6), (3, 4), (12, 1), (1, 12), (1,), (5,), (11,)]


@pytest.mark.parametrize("n", [1, 2, 9])
@pytest.mark.parametrize("query", QUERIES, ids=str)
@pytest.mark.parametrize("normed", [False, True])
def test_a_read_is_the_formula(backend, n, query, normed):
    for shape in ((), (3,), (2, 1, 65), (0, 4)):
        leaves = draw(n, shape, 12, query)
        q, g, weight, *sources = leaves

        def reads(chained, q=q, g=g, weight=weight, sources=sources):
            norm = (weight, 1e-2) if normed else None
            x, chain = chained(q, sources, g, 1e-3, scale=2.0, norm=norm)
            return [x, chained(q, [*chain, x], g, 1e-3, scale=1.5, norm=None)[0]]

        def formula(q, sources, g, eps, scale, norm):
            h = written_out(q, g, sources, eps, scale)[0]
            if norm is not None:
                h = torch.nn.functional.rms_norm(h, h.shape[-1:], norm[0], norm[1])
            return h, sources

        got, want = gradients(reads(ops.read_norm_chained), leaves), gradients(reads(formula), leaves)
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
        h, weights = ops.depth_attention(q, sources, g, 1e-3, return_weights=True)
        torch.testing.assert_close((h, weights), written_out(q, g, sources, 1e-3, 1.0))
        with torch.no_grad():
            torch.testing.assert_close(ops.read_norm(q, sources, g, 1e-3), h)
            torch.testing.assert_close(ops.read_norm(ops.fold(q, g, h.dtype), sources, None, 1e-3), h)


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("n", [1, 3, 4, 9, 70])
@pytest.mark.parametrize(("shape", "dim"), SHAPES)
def test_a_weighted_sum_is_the_sum(backend, n, shape, dim, per_token):
    _, _, _, *sources = draw(n, shape, dim, (1,))
    weights = torch.randn(n, *shape if per_token else (), dtype=torch.float64, requires_grad=True)

    def sums(function):
        h, chain = function(weights, sources)
        return [h, function(weights, chain)[0].square(), *chain]

    def plain(weights, sources):
        return sum(w.unsqueeze(-1) * v for w, v in zip(weights, sources, strict=True)), sources

    leaves = [weights, *sources]
    torch.testing.assert_close(gradients(sums(ops.weighted_sum), leaves), gradients(sums(plain), leaves))
    with torch.no_grad():
        torch.testing.assert_close(ops.weighted_sum(weights, sources)[0], plain(weights, sources)[0])


@pytest.mark.skipif(not COMPILED, reason="no compiler")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("query", [(5, 13), (21,)])
def test_error_is_at_most_twice_the_references(dtype, query):
    leaves = draw(7, (40, 3), 65, query, dtype)
    weights = torch.randn(7, dtype=torch.float64).to(dtype).requires_grad_()

    def everything(backend, leaves, weights):
        q, g, weight, *sources = leaves
        x, chain = backend.read_norm_chained(q, sources, g, 1e-3, norm=(weight, 1e-2))
        return gradients([x, backend.weighted_sum(weights, chain)[0]], [*leaves, weights])

    wide = [t.detach().double().requires_grad_() for t in (*leaves, weights)]
    truth, plain = everything(Reference(), wide[:-1], wide[-1]), everything(Reference(), leaves, weights)
    floor = 16 * torch.finfo(torch.float32).eps
    for found, rival, want in zip(everything(NATIVE, leaves, weights), plain, truth, strict=True):
        assert found.dtype == rival.dtype and found.shape == rival.shape
        assert (found.double() - want).norm() <= 2 * (rival.double() - want).norm() + floor * want.norm()


@pytest.mark.skipif(not COMPILED, reason="no compiler")
def test_second_derivatives_are_the_references():
    for query in ((2, 3), (4,)):
        leaves = draw(3, (4,), 6, query)
        weights = torch.randn(3, dtype=torch.float64, requires_grad=True)

        def second(backend, leaves=leaves, weights=weights):
            q, g, weight, *sources = leaves
            x, chain = backend.read_norm_chained(q, sources, g, 1e-3, norm=(weight, 1e-2))
            result = (x * backend.weighted_sum(weights, chain)[0]).square().sum()
            first = torch.autograd.grad(result, [weights, *leaves], create_graph=True)
            return torch.autograd.grad(sum(g.square().sum() for g in first), [weights, *leaves])

        torch.testing.assert_close(second(NATIVE), second(Reference()))


def test_infinity_stays_where_it_is(backend):
    """Of channels that are no key, and of another slice, nothing reaches a logit."""
    _, _, _, *sources = draw(3, (2,), 6, (2,))
    with torch.no_grad():
        sources[1][0, 0] = torch.inf
        h = ops.read_norm(torch.ones(2, dtype=torch.float64), sources, torch.ones(2, dtype=torch.float64), 1e-3)
        assert h[0, 0] == torch.inf and h.flatten()[1:].isfinite().all()
        ones = torch.ones(2, 3, dtype=torch.float64)
        assert ops.read_norm(ones, sources, ones, 1e-3)[0, 3:].isfinite().all()


@pytest.mark.skipif(not COMPILED, reason="no compiler")
def test_threads_do_not_change_a_result():
    leaves = draw(5, (300,), 64, (4, 16))
    weights = torch.randn(5, dtype=torch.float64, requires_grad=True)
    q, g, weight, *sources = leaves

    def results():
        x, chain = NATIVE.read_norm_chained(q, sources, g, 1e-3, norm=(weight, 1e-2))
        return gradients([x, NATIVE.weighted_sum(weights, chain)[0]], [*leaves, weights])

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = results()
    torch.set_num_threads(3)
    try:
        torch.testing.assert_close(results(), alone, rtol=1e-12, atol=1e-12)
    finally:
        torch.set_num_threads(before)


def test_a_backend_without_slices_leaves_them_to_the_formulas():
    class Halves(Eager):
        takes_slices = False

        def read_with_weights(self, *_):
            raise AssertionError("asked for slices")

    q, g, _, *sources = draw(3, (2,), 6, (2, 3))
    ops.set_backend(Halves())
    try:
        got = ops.depth_attention(q, sources, g)
        assert isinstance(dispatch.select(sources[0], 3), Halves)
    finally:
        ops.set_backend("auto")
    torch.testing.assert_close(got, written_out(q, g, sources, 1e-6, 1.0)[0])


@pytest.mark.parametrize("shape", [(7,), (0,), (4, 6), (2, 2), (2, 3, 1), ()])
def test_queries_of_no_part_are_refused(shape):
    with pytest.raises(
        ValueError, match=r"query must have shape 6, as the sources are wide, or with a key_norm like it"
    ):
        ops.depth_attention(torch.zeros(shape), [torch.zeros(2, 6)], torch.zeros(shape))


def test_key_norms_and_weights_that_do_not_fit_are_refused():
    row = torch.zeros(2, 6)
    with pytest.raises(ValueError, match="key_norm must have shape 2x3"):
        ops.depth_attention(torch.zeros(2, 3), [row], torch.zeros(3, 2))
    with pytest.raises(ValueError, match="query must have shape 6"):
        ops.depth_attention(torch.zeros(2, 3), [row], torch.zeros(6))
    for weights in (torch.zeros(3), torch.zeros(2, 3), torch.zeros(2, 2, 6), torch.zeros(2, device="meta")):
        with pytest.raises(ValueError, match=r"weights must have shape \[2\] or \[2, 2\] and be on cpu"):
            ops.weighted_sum(weights, [row, row])


def test_a_mix_of_slices_is_that_of_each():
    weights, sources = torch.rand(3, 4, 2), [torch.randn(4, 6) for _ in range(3)]
    halves = [formulas.mix(weights[..., a], [s[:, 3 * a : 3 * a + 3] for s in sources]) for a in (0, 1)]
    torch.testing.assert_close(formulas.mix(weights, sources), torch.cat(halves, -1))
