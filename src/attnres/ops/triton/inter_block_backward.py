"""Triton kernel of phase 1's backward pass; the forward pass and its letters are those of `inter_block`.

With do_l and dlse_l the gradients that the merges left, and dv_i' that of later blocks:

    dz_il = p_il (<do_l, v_i> - sum_j p_jl <do_l, v_j> + dlse_l),   c_il = dz_il r_i,   e_i = sum_l dz_il z_il r_i^2 / D
    dv_i  = dv_i' + sum_l (p_il do_l + c_il q_l) - e_i v_i
    dq_l  = sum_tokens sum_i c_il v_i

The norm's gradient needs o_0, which is made again: with y = dx * weight, t = scale * rstd and k = t^2 <y, o_0> / D it
is do_0 = t (y - k o_0), and <do_0, v_i> = t (<y, v_i> - k <o_0, v_i>), so all sums over a row need one barrier.

A program holds all rows of a token in registers. Rows moved a token: 3n + S; dq is summed over each program's tokens in
registers.
"""

# Triton compiles tuple concatenation but not unpacking, and its tuples grow.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment, misc, var-annotated"

import torch
import triton
import triton.language as tl
from torch import Tensor

from .inter_block_wide import fold, wide_coefficients
from .launch import dense, dense_or_none, launch, row_config, row_shape, tensor_list
from .lists import dots, load_rows, store_gradient, sums
from .reduce import query_partials, sum_partials

MAX_QUERIES, MAX_SOURCES, MAX_ELEMENTS = 4, 12, 8
"""For more, `inter_block_wide` is faster: what is done once a source and query is done by every thread here, and
a thread that holds more elements of a row runs out of registers."""


@triton.jit
def _weights_of(p_logits, query: tl.constexpr, lse, TILE: tl.constexpr, QUERIES: tl.constexpr):
    weights = ()
    for j in tl.static_range(TILE):
        weights = weights + (tl.exp(tl.load(p_logits + j * QUERIES + query) - lse),)
    return weights


@triton.jit
def _source_gradients(
    p_later, p_dsources, p_logits, p_rstd, p_q, o_d, o_row, m_d, rows, douts, along_rows, deltas, lses, dqs,
    D: tl.constexpr, COUNT: tl.constexpr, TILE: tl.constexpr, QUERIES: tl.constexpr, CHAINED: tl.constexpr, p_like,
):  # fmt: skip
    """Writes the gradients of the sources; returns dqs with this token's part added.

    along_rows: <do_l, v_j> at l * TILE + j; deltas: sum_j p_jl <do_l, v_j> - dlse_l."""
    gradients = ()
    along = ()
    for j in tl.static_range(TILE):
        gradients = gradients + (tl.zeros_like(rows[j]).to(tl.float32),)
        along = along + (0.0,)
    new_dqs = ()
    for l in tl.static_range(QUERIES):
        b_q = tl.load(p_q + l * D + o_d, mask=m_d, other=0.0)
        b_dout = douts[l].to(tl.float32)
        b_dq = dqs[l]
        new_gradients = ()
        new_along = ()
        for j in tl.static_range(TILE):
            logit = tl.load(p_logits + j * QUERIES + l)
            rstd = tl.load(p_rstd + j)
            p = tl.exp(logit - lses[l])
            along_query = p * (along_rows[l * TILE + j] - deltas[l]) * rstd
            b_dq += along_query * rows[j].to(tl.float32)
            new_gradients = new_gradients + (gradients[j] + p * b_dout + along_query * b_q,)
            new_along = new_along + (along[j] + along_query * logit * rstd,)
        gradients = new_gradients
        along = new_along
        new_dqs = new_dqs + (b_dq,)
    for j in tl.static_range(TILE):
        b_dv = gradients[j] - (along[j] / D) * rows[j].to(tl.float32)
        store_gradient(b_dv, p_later, p_dsources, 0, j, o_row, m_d, COUNT, TILE, CHAINED, p_like)
    return new_dqs


@triton.jit(do_not_specialize=["num_tokens"])
def inter_block_backward(
    p_sources, p_later, p_dsources, p_douts, p_q, p_weight, p_logits, p_rstd, p_lse, p_dlse, p_partial, num_tokens,
    scale,
    D: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, COUNT: tl.constexpr,
    TILE: tl.constexpr, OUTS: tl.constexpr, QUERIES: tl.constexpr, NORM: tl.constexpr, AFFINE: tl.constexpr,
    CHAINED: tl.constexpr, STAGES: tl.constexpr, p_like,
):  # fmt: skip
    """p_partial: [programs, S + AFFINE, D], this program's sums of dq and of the norm weight's gradient. TILE is n."""
    o_d = tl.arange(0, BLOCK)
    m_d = o_d < D
    dqs = (tl.zeros([BLOCK], tl.float32),) * QUERIES
    b_dweight = tl.zeros([BLOCK], tl.float32)

    for token in tl.range(tl.program_id(0).to(tl.int64), num_tokens, tl.num_programs(0), num_stages=STAGES):
        o_row = token * D + o_d
        p_z = p_logits + token * TILE * QUERIES
        p_r = p_rstd + token * (TILE + 1)
        douts = load_rows(p_douts, 0, o_row, m_d, OUTS, QUERIES, p_like)
        rows = load_rows(p_sources, 0, o_row, m_d, COUNT, TILE, p_like)
        lses = ()
        for l in tl.static_range(QUERIES):
            lses = lses + (tl.load(p_lse + l * num_tokens + token),)
        if NORM:
            t = scale * tl.load(p_r + TILE)
            b_dx = douts[0].to(tl.float32)
            b_y = b_dx
            if AFFINE:
                b_y = b_dx * tl.load(p_weight + o_d, mask=m_d, other=0.0).to(tl.float32)
            b_first = tl.zeros([BLOCK], tl.float32)
            weights = _weights_of(p_z, 0, lses[0], TILE, QUERIES)
            for j in tl.static_range(TILE):
                b_first += weights[j] * rows[j].to(tl.float32)
            parts = dots(rows, b_y, TILE, LANES, VECTOR)
        else:
            parts = dots(rows, douts[0].to(tl.float32), TILE, LANES, VECTOR)
        for l in tl.static_range(1, QUERIES):
            parts = parts + dots(rows, douts[l].to(tl.float32), TILE, LANES, VECTOR)
        if NORM:
            parts = parts + dots(rows, b_first, TILE, LANES, VECTOR)
        along_rows = sums(parts, TILE * (QUERIES + NORM))
        if NORM:
            along = 0.0
            for j in tl.static_range(TILE):
                along += weights[j] * along_rows[j]
            k = t * t * along / D
            firsts = ()
            for j in tl.static_range(TILE):
                firsts = firsts + (t * (along_rows[j] - k * along_rows[TILE * QUERIES + j]),)
            along_rows = firsts + along_rows[TILE : TILE * QUERIES]
        deltas = ()
        for l in tl.static_range(QUERIES):
            delta = -tl.load(p_dlse + l * num_tokens + token)
            weights = _weights_of(p_z, l, lses[l], TILE, QUERIES)
            for j in tl.static_range(TILE):
                delta += weights[j] * along_rows[l * TILE + j]
            deltas = deltas + (delta,)
        if NORM:
            douts = (t * (b_y - k * b_first),) + douts[1:]
        dqs = _source_gradients(
            p_later, p_dsources, p_z, p_r, p_q, o_d, o_row, m_d, rows, douts, along_rows, deltas, lses, dqs,
            D, COUNT, TILE, QUERIES, CHAINED, p_like,
        )  # fmt: skip
        if AFFINE:
            b_dweight += b_dx * (t * b_first)

    p_row = p_partial + tl.program_id(0) * (QUERIES + AFFINE) * D + o_d
    for l in tl.static_range(QUERIES):
        tl.store(p_row + l * D, dqs[l], mask=m_d)
    if AFFINE:
        tl.store(p_row + QUERIES * D, b_dweight, mask=m_d)


def rows_fit(source: Tensor, n: int, num_queries: int) -> bool:
    """Whether the kernels here are for so many sources, queries and elements."""
    block, warps = row_shape("inter_block_backward", source.shape[-1])
    return num_queries <= MAX_QUERIES and n <= MAX_SOURCES and block <= MAX_ELEMENTS * 32 * warps


def inter_block_gradients(
    queries: Tensor, key_norms: Tensor, sources: list[Tensor], weight: Tensor | None, lse: Tensor, logits: Tensor,
    rstd: Tensor, douts: list[Tensor], dlse: Tensor, later: list[Tensor], norm_eps: float | None, scale: float,
) -> tuple[Tensor, Tensor, list[Tensor], Tensor]:  # fmt: skip
    """(dqueries, dkey_norms, dsources, dweight or empty). later: what is added to dsources, or nothing."""
    sources, later, douts = ([dense(t) for t in tensors] for tensors in (sources, later, douts))
    queries, key_norms, weight = dense(queries), dense(key_norms), dense_or_none(weight)
    dsources = [torch.empty_like(source) for source in sources]
    n, num_queries, width = len(sources), *queries.shape
    num_tokens = rstd.numel() // (n + 1)
    if num_tokens == 0:
        return torch.zeros_like(queries), torch.zeros_like(key_norms), dsources, _empty_like(queries, weight).zero_()
    q = fold(queries, key_norms)
    if not rows_fit(sources[0], n, num_queries):
        assert norm_eps is None, "the first read comes with its norm only from the kernel here"
        along_query = wide_coefficients(q, sources, lse, logits, rstd, douts, dense(dlse), later, dsources)
        partial = query_partials(sources, along_query, num_queries)
    else:
        config = row_config("inter_block_backward", sources[0], num_tokens, n)
        partial = lse.new_empty((config.programs, num_queries + (weight is not None), width))
        p_sources, p_douts = tensor_list(sources, n), tensor_list(douts, num_queries)
        launch(
            inter_block_backward, (config.programs,),
            p_sources.pointers, tensor_list(later, n).pointers if later else None, tensor_list(dsources, n).pointers,
            p_douts.pointers, q, weight, logits, rstd, lse, dense(dlse), partial, num_tokens, scale,
            D=width, BLOCK=config.BLOCK, LANES=config.LANES, VECTOR=config.VECTOR, COUNT=p_sources.COUNT, TILE=n,
            OUTS=p_douts.COUNT, QUERIES=num_queries, NORM=norm_eps is not None, AFFINE=weight is not None,
            CHAINED=len(later) > 0, STAGES=config.STAGES, p_like=sources[0], num_warps=config.num_warps,
            device=sources[0].device,
        )  # fmt: skip
    dqueries, dkey_norms, dweight = sum_partials(partial, queries, key_norms, weight)
    return dqueries, dkey_norms, dsources, dweight


inter_block_gradients_op = torch.library.custom_op(
    "attnres::inter_block_backward", inter_block_gradients, mutates_args=()
)


@inter_block_gradients_op.register_fake
def _(queries, key_norms, sources, weight, lse, logits, rstd, douts, dlse, later, norm_eps, scale):  # type: ignore[no-untyped-def]
    return (
        queries.new_empty(queries.shape),
        key_norms.new_empty(key_norms.shape),
        [source.new_empty(source.shape) for source in sources],
        _empty_like(queries, weight),
    )


def _empty_like(queries: Tensor, weight: Tensor | None) -> Tensor:
    return queries.new_empty(0, dtype=torch.float32) if weight is None else weight.new_empty(weight.shape)
