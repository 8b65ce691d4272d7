"""The Triton kernels against the reference in fp64: values and every gradient.

Without a GPU the kernels run in Triton's interpreter.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from attnres.ops.formulas import Norm
from attnres.ops.reference import Reference
from attnres.ops.triton import inter_block_backward, launch, reduce, table
from attnres.ops.triton.backend import Triton

from ..device import DEVICE

kernels, reference = Triton(), Reference()
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
# of the largest value; the interpreter truncates to bf16 and adds up hundreds of fp32 numbers one after another
FLOOR = {F32: 1e-5, F16: 1e-3, BF16: 1e-2}


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty and its kin are filled with NaN: whatever a kernel forgets to write shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def check(
    call: Callable[..., tuple[Tensor, ...]],
    parameters: list[Tensor | None],
    activations: list[Tensor],
    dtype: torch.dtype,
) -> None:
    """Runs call(backend, parameters, activations) with the kernels and the reference, activations in `dtype`, and with
    the reference in fp64. The kernels' error may be twice the reference's, plus the floor."""
    activations = [t.to(dtype) for t in activations]
    results = {}
    for name, backend, parameter_dtype, activation_dtype in (
        ("kernels", kernels, F32, dtype),
        ("reference", reference, F32, dtype),
        ("truth", reference, torch.float64, torch.float64),
    ):
        leaves = [None if p is None else p.detach().to(DEVICE, parameter_dtype).requires_grad_() for p in parameters]
        sources = [a.detach().to(DEVICE, activation_dtype).requires_grad_() for a in activations]
        outputs = call(backend, leaves, sources)
        cotangents = [randn(*output.shape, seed=9 + i).to(output) for i, output in enumerate(outputs)]
        torch.autograd.backward(outputs, cotangents)
        gradients = [t.grad for t in (*leaves, *sources) if t is not None]
        results[name] = [t.detach().double() for t in (*outputs, *gradients)]
    scale = max(t.abs().max() for t in results["truth"])
    for i, (ours, theirs, truth) in enumerate(zip(*results.values(), strict=True)):
        floor = FLOOR[dtype] * max(truth.abs().max().item(), 1e-3 * scale.item())
        error, allowed = (ours - truth).abs().max().item(), 2 * (theirs - truth).abs().max().item() + floor
        assert error <= allowed, f"tensor {i} of {len(results['truth'])}: error {error:.2e}, allowed {allowed:.2e}"


def norm_of(kind: str, weight: Tensor | None) -> Norm | None:
    return {"none": None, "plain": (None, 1e-5), "affine": (weight, 1e-5)}[kind]


def weight_for(kind: str, width: int) -> Tensor | None:
    return randn(width, seed=3) if kind == "affine" else None


READS = [
    # sources, width, tokens, dtype, norm, magnitude of the query
    (1, 40, 3, F32, "affine", 1.0),
    (2, 100, 1, F16, "none", 0.3),
    (3, 257, 3, BF16, "plain", 0.1),
    (4, 40, 17, F32, "none", 0.3),
    (6, 33, 3, F16, "affine", 0.3),
    (6, 100, 2, F32, "none", 0.0),
    (19, 40, 2, F32, "affine", 0.3),
    (19, 24, 1, BF16, "none", 0.3),
]


@pytest.mark.parametrize(("n", "width", "tokens", "dtype", "norm", "magnitude"), READS)
def test_read(n, width, tokens, dtype, norm, magnitude):
    def call(backend, parameters, sources):
        query, key_norm, weight = parameters
        return (backend.read_norm(query, sources, key_norm, 1e-6, scale=float(n), norm=norm_of(norm, weight)),)

    parameters = [magnitude * randn(width), 1 + 0.1 * randn(width, seed=1), weight_for(norm, width)]
    check(call, parameters, [randn(tokens, width, seed=10 + i) for i in range(n)], dtype)


@pytest.mark.parametrize(("n", "dtype", "norm"), [(1, F16, "none"), (3, F32, "affine"), (5, F16, "plain")])
def test_chained_read_hands_sources_on(n, dtype, norm):
    def call(backend, parameters, sources):
        query, key_norm, weight = parameters
        x, handed_on = backend.read_norm_chained(query, sources, key_norm, 1e-6, scale=1.0, norm=norm_of(norm, weight))
        return (x, *handed_on)

    width = 40
    parameters = [0.3 * randn(width), 1 + 0.1 * randn(width, seed=1), weight_for(norm, width)]
    check(call, parameters, [randn(2, width, seed=10 + i) for i in range(n)], dtype)


BLOCKS = [
    # sources, queries, width, tokens, dtype, magnitude of the queries
    (1, 2, 40, 3, F32, 1.0),
    (2, 3, 257, 1, F16, 0.1),
    (5, 6, 40, 1, F32, 0.3),
    (3, 10, 24, 1, BF16, 0.3),
    (18, 1, 24, 2, F32, 0.3),
    (2, 18, 24, 1, F32, 0.3),
]


@pytest.mark.parametrize(("n", "queries", "width", "tokens", "dtype", "magnitude"), BLOCKS)
def test_inter_block(n, queries, width, tokens, dtype, magnitude, monkeypatch):
    """As with many tokens: a program loops over groups of queries."""
    monkeypatch.setattr(launch, "FEW_TOKENS", 0)

    def call(backend, parameters, sources):
        outs, lses = backend.inter_block(parameters[0], sources, parameters[1], 1e-6)
        return (*outs, *lses)

    parameters = [magnitude * randn(queries, width), 1 + 0.1 * randn(queries, width, seed=1)]
    check(call, parameters, [randn(tokens, width, seed=10 + i) for i in range(n)], dtype)


@pytest.mark.parametrize(("n", "queries", "dtype"), [(1, 3, F16), (2, 5, F32), (5, 2, F16), (17, 2, F32)])
def test_chained_inter_block_hands_sources_on(n, queries, dtype):
    """As with few tokens: a program has two queries at most."""

    def call(backend, parameters, sources):
        outs, lses, handed_on = backend.inter_block_chained(parameters[0], sources, parameters[1], 1e-6)
        return (*outs, *lses, *handed_on)

    width = 24
    parameters = [0.3 * randn(queries, width), 1 + 0.1 * randn(queries, width, seed=1)]
    check(call, parameters, [randn(2, width, seed=10 + i) for i in range(n)], dtype)


@pytest.mark.parametrize("rows", ["held", "wide"])
@pytest.mark.parametrize(
    ("n", "queries", "dtype", "norm"),
    [
        (1, 3, F32, "affine"),
        (3, 4, F16, "plain"),
        (4, 1, F32, "affine"),
        (17, 3, F32, "affine"),
        (14, 2, BF16, "plain"),
    ],
)
def test_first_read_with_its_norm(n, queries, dtype, norm, rows, monkeypatch):
    """What a program can hold decides which kernel runs backward, and whether the norm is a kernel of its own."""
    if rows == "wide":
        monkeypatch.setattr(inter_block_backward, "MAX_ELEMENTS", 0)

    def call(backend, parameters, sources):
        queries, key_norms, weight = parameters
        outs, lses, handed_on = backend.inter_block_chained(
            queries, sources, key_norms, 1e-6, scale=3.0, norm=norm_of(norm, weight)
        )
        return (*outs, *lses, *handed_on)

    width = 24
    parameters = [0.3 * randn(queries, width), 1 + 0.1 * randn(queries, width, seed=1), weight_for(norm, width)]
    check(call, parameters, [randn(3, width, seed=10 + i) for i in range(n)], dtype)


@pytest.mark.parametrize("kernel", ["inter_block_forward", "inter_block_backward", "read_forward", "read_backward"])
@pytest.mark.parametrize("tile", [1, 3])
def test_the_launch_table_decides_on_speed_alone(kernel, tile):
    def call(backend, parameters, sources):
        queries, key_norms = parameters
        outs, lses, sources = backend.inter_block_chained(queries, sources, key_norms, 1e-6, norm=(None, 1e-5))
        x, sources = backend.read_norm_chained(queries[0], sources, key_norms[0], 1e-6, scale=2.0, norm=None)
        return (*outs, *lses, x, *sources)

    parameters = [0.3 * randn(2, 24), 1 + 0.1 * randn(2, 24, seed=1)]
    with table.override(kernel, warps=1, tile=tile, programs=2):
        check(call, parameters, [randn(3, 24, seed=10 + i) for i in range(5)], F32)


@pytest.mark.parametrize(
    ("n", "width", "tokens", "dtype", "norm"),
    [(1, 40, 3, F32, "affine"), (3, 257, 1, F16, "plain"), (6, 33, 5, F32, "none"), (12, 24, 2, BF16, "affine")],
)
def test_read_goes_on_from_phase_1(n, width, tokens, dtype, norm):
    def call(backend, parameters, activations):
        query, key_norm, weight, lse = parameters
        out, *sources = activations
        x, handed_on = backend.read_norm_chained(
            query, sources, key_norm, 1e-6, scale=2.0, norm=norm_of(norm, weight), prior=(out, lse)
        )
        return (x, *handed_on)

    parameters = [0.3 * randn(width), 1 + 0.1 * randn(width, seed=1), weight_for(norm, width), randn(tokens, seed=4)]
    check(call, parameters, [randn(tokens, width, seed=10 + i) for i in range(n + 1)], dtype)


@pytest.mark.parametrize("partial", [False, True])
@pytest.mark.parametrize(
    ("width", "tokens", "dtype", "norm"),
    [(40, 3, F32, "affine"), (257, 1, F16, "plain"), (100, 3, BF16, "affine"), (33, 17, F32, "none")],
)
def test_merge(width, tokens, dtype, norm, partial):
    def call(backend, parameters, activations):
        query, key_norm, weight, lse = parameters
        *before, update, out = activations
        return backend.merge_norm(
            query, *(before or [None]), update, key_norm, out, lse, 1e-6, scale=3.0, norm=norm_of(norm, weight)
        )

    parameters = [0.3 * randn(width), 1 + 0.1 * randn(width, seed=1), weight_for(norm, width), randn(tokens, seed=4)]
    check(call, parameters, [randn(tokens, width, seed=10 + i) for i in range(2 + partial)], dtype)


@pytest.mark.parametrize("dtype", [F16, BF16])
def test_sums_are_rounded_before_they_are_used(dtype):
    """What a merge or a norm sees is what the next layer is handed."""
    partial, update, out = (randn(3, 40, seed=i).to(DEVICE, dtype) for i in range(3))
    query, key_norm, lse = randn(40).to(DEVICE), torch.ones(40, device=DEVICE), randn(3).to(DEVICE)
    norm = (None, 1e-6)
    total, x = kernels.merge_norm(query, partial, update, key_norm, out, lse, 1e-6, scale=1.0, norm=norm)
    _, again = kernels.merge_norm(query, None, total, key_norm, out, lse, 1e-6, scale=1.0, norm=norm)
    torch.testing.assert_close(x, again, rtol=0, atol=0)
    total, x = kernels.add_norm(partial, update, norm=norm)
    _, again = kernels.add_norm(total, torch.zeros_like(total), norm=norm)
    torch.testing.assert_close(x, again, rtol=0, atol=0)


@pytest.mark.parametrize("gap", [-1e4, -30.0, 0.0, 30.0, 1e4])
def test_merge_with_any_distance_between_the_shares(gap):
    def call(backend, parameters, activations):
        query, key_norm, lse = parameters
        partial, out = activations
        return backend.merge_norm(query, None, partial, key_norm, out, lse, 1e-6, scale=2.0)[1:]

    width = 40
    # a huge read that hardly counts must not leave its rounding error behind
    activations = [randn(3, width), 1e4 * randn(3, width, seed=1)]
    check(call, [0.1 * randn(width), torch.ones(width), gap + randn(3)], activations, F32)


def test_a_small_share_of_a_huge_read():
    """1 - sigmoid in fp32 knows nothing of a share of 1e-8; that of a read of 1e8 counts."""
    query, key_norm, partial, out = torch.zeros(40), torch.ones(40), randn(3, 40), 1e8 * randn(3, 40, seed=1)
    query, *tensors = (t.to(DEVICE) for t in (query, partial, key_norm, out, torch.full((3,), -18.0)))
    _, want = reference.merge_norm(query.double(), None, *[t.double() for t in tensors], 1e-6)
    _, got = kernels.merge_norm(query, None, *tensors, 1e-6)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("width", "tokens", "dtype", "norm"),
    [(40, 17, F32, "affine"), (257, 1, F16, "plain"), (100, 3, BF16, "affine"), (40, 3, F32, "none")],
)
def test_add_norm(width, tokens, dtype, norm):
    def call(backend, parameters, activations):
        return backend.add_norm(*activations, norm=norm_of(norm, parameters[0]))

    check(call, [weight_for(norm, width)], [randn(tokens, width), randn(tokens, width, seed=1)], dtype)


@pytest.mark.parametrize(
    ("width", "tokens", "dtype", "norm"), [(40, 3, F32, "affine"), (257, 1, F16, "plain"), (100, 3, BF16, "affine")]
)
def test_rms_norm(width, tokens, dtype, norm):
    def call(backend, parameters, activations):
        return (backend.rms_norm(activations[0], norm_of(norm, parameters[0])),)

    check(call, [weight_for(norm, width)], [randn(tokens, width)], dtype)


@pytest.mark.parametrize("n", [3, 5])
@pytest.mark.parametrize("dtype", [F32, F16])
def test_one_source_takes_all_the_weight(n, dtype):
    width = 40
    sources = [randn(2, width, seed=10 + i) for i in range(n)]
    query = 1e4 * sources[n - 2].mean(0)  # logits are tens of thousands apart

    def call(backend, parameters, sources):
        outs, lses = backend.inter_block(parameters[0][None], sources, parameters[1][None], 1e-6)
        return (backend.read_norm(*parameters[:1], sources, parameters[1], 1e-6, scale=1.0, norm=None), *outs, *lses)

    check(call, [query, torch.ones(width)], sources, dtype)


@pytest.mark.parametrize("magnitude", [1e-12, 1e-4, 1e12])
def test_magnitudes_and_zero_rows(magnitude):
    """fp32 squares of these neither overflow nor matter beside eps where they vanish."""
    width = 40
    sources = [magnitude * randn(2, width, seed=10 + i) for i in range(3)]
    sources[1] = torch.zeros(2, width)

    def call(backend, parameters, sources):
        query, key_norm = parameters
        outs, lses = backend.inter_block(query[None], sources, key_norm[None], 1e-6)
        x = backend.read_norm(query, sources, key_norm, 1e-6, scale=3.0, norm=(None, 1e-30))
        return (x, *outs, *lses)

    check(call, [0.3 * randn(width), torch.ones(width)], sources, F32)


def test_as_many_sources_as_allowed():
    width, n = 16, 256

    def call(backend, parameters, sources):
        return (backend.read_norm(parameters[0], sources, parameters[1], 1e-6),)

    check(call, [randn(width), torch.ones(width)], [randn(1, width, seed=10 + i) for i in range(n)], F32)


def test_inter_block_of_as_many_sources_as_allowed():
    width, n = 16, 256
    sources = [randn(1, width, seed=10 + i).to(DEVICE) for i in range(n)]
    (out,), (lse,) = kernels.inter_block(randn(1, width).to(DEVICE), sources, torch.ones(1, width).to(DEVICE), 1e-6)
    (want,), (want_lse,) = reference.inter_block(
        randn(1, width), [s.cpu() for s in sources], torch.ones(1, width), 1e-6
    )
    torch.testing.assert_close(out.cpu(), want)
    torch.testing.assert_close(lse.cpu(), want_lse)


@pytest.mark.parametrize("n", [2, 6, 19])
def test_weights(n):
    sources = [randn(2, 3, 40, seed=10 + i).to(DEVICE) for i in range(n)]
    query, key_norm = randn(40).to(DEVICE), 1 + 0.1 * randn(40, seed=1).to(DEVICE)
    h, weights = kernels.read_with_weights(query, sources, key_norm, 1e-6, scale=2.0)
    want, want_weights = reference.read_with_weights(query, sources, key_norm, 1e-6, scale=2.0)
    assert weights.shape == (n, 2, 3)
    torch.testing.assert_close(h, want)
    torch.testing.assert_close(weights, want_weights)


def test_split_products_of_the_query_gradient():
    """On GPUs bf16 sources meet the coefficients as two bf16 numbers; here fp16, as the interpreter has no bf16 dot."""
    n, tokens, queries, width = 2, 37, 3, 40
    sources = tuple(randn(tokens, width, seed=10 + i).to(DEVICE, F16) for i in range(n))
    coefficients = randn(tokens, n, queries).to(DEVICE)
    partial = torch.empty(2, queries, width, device=DEVICE)
    launch.launch(
        reduce.query_gradient,
        (2, 2),
        sources,
        coefficients,
        partial,
        n,
        queries,
        tokens,
        32,
        D=width,
        BLOCK=32,
        TOKENS=16,
        COUNT=n,
        QUERIES=16,
        SPLIT=True,
        p_like=sources[0],
        num_warps=4,
        device=partial.device,
    )
    want = torch.einsum("tns,ntd->sd", coefficients.double(), torch.stack(sources).double())
    torch.testing.assert_close(partial.sum(0).double(), want, rtol=0, atol=2**-18 * want.abs().max().item())


def test_sum_over_many_programs():
    """More than the three programs of the interpreter."""
    queries, key_norms, weight = (randn(*shape).to(DEVICE) for shape in ((2, 100), (2, 100), (100,)))
    partial = randn(70, 3, 100, seed=1).to(DEVICE)
    dqueries, dkey_norms, dweight = reduce.sum_partials(partial, queries, key_norms, weight)
    *dq, want = partial.sum(0)
    torch.testing.assert_close(dqueries, torch.stack(dq) * key_norms)
    torch.testing.assert_close(dkey_norms, torch.stack(dq) * queries)
    torch.testing.assert_close(dweight, want)
