"""Phase 1 for many queries or wide rows: what a program of `inter_block` cannot hold, or would be slow at.

The formulas are those of `inter_block`. One program serves one token, in three steps: the dot products, over
chunks of the width; the softmax or its gradient, over n x S scalars; the sums, over chunks again, whose rows now come
from L1 or L2. A row is thus never held whole, and neither n nor S is bounded by registers: sources go in tiles, queries
in groups. The scalars pass between the steps through memory: 8 n S bytes beside the 2 D (n + S) of the rows. Rows moved
a token: n + S forward, 3n + S backward, and n for dq, which `reduce.query_partials` makes.
"""

# Triton compiles tuple concatenation but not unpacking, and its tuples grow.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import ChunkConfig, chunk_config, launch, tensor_list
from .lists import join, joined_sums, load_folded, load_rows, num_tiles, row_pointer, store_gradient


@triton.jit
def _per_lane(b_x, LANES: tl.constexpr):
    """Adds up what one thread holds of a chunk: [BLOCK] -> [LANES]."""
    return tl.sum(tl.reshape(b_x, [LANES, b_x.shape[0] // LANES]), 1)


@triton.jit
def _zeros(LANES: tl.constexpr, COUNT: tl.constexpr):
    parts = ()
    for _ in tl.static_range(COUNT):
        parts = parts + (tl.zeros([LANES], tl.float32),)
    return join(parts, COUNT)


@triton.jit(do_not_specialize=["n", "num_queries", "num_tokens"])
def inter_block_forward_wide(
    p_sources, p_outs, p_q, p_logits, p_weights, p_rstd, p_lse, n, num_queries, num_tokens, eps,
    D: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr, COUNT: tl.constexpr, TILE: tl.constexpr,
    OUTS: tl.constexpr, GROUP: tl.constexpr, SOURCES: tl.constexpr, QUERIES: tl.constexpr, MIX: tl.constexpr, p_like,
):  # fmt: skip
    """p_q: [S, D] fp32; p_logits, p_weights: [T, n, S]; p_rstd: [T, n + 1]; p_lse: [S, T]. SOURCES, QUERIES: powers of
    two that hold n and S. MIX false (n = 1): o_l is the source itself and not written."""
    token = tl.program_id(0).to(tl.int64)
    num_groups = tl.cdiv(num_queries, GROUP)
    o_chunk = tl.arange(0, BLOCK)
    p_scalars = token * n * num_queries

    for tile in tl.range(0, num_tiles(n, COUNT, TILE)):
        for group in tl.range(0, num_groups):
            b_dots = _zeros(LANES, TILE * GROUP)
            b_squares = _zeros(LANES, TILE)
            for start in tl.range(0, D, BLOCK):
                o_d = start + o_chunk
                m_d = o_d < D
                rows = load_rows(p_sources, tile, token * D + o_d, m_d, COUNT, TILE, p_like)
                dots = ()
                squares = ()
                for j in tl.static_range(TILE):
                    squares = squares + (_per_lane(rows[j].to(tl.float32) * rows[j].to(tl.float32), LANES),)
                for l in tl.static_range(GROUP):
                    b_q = load_folded(p_q, group * GROUP + l, num_queries, o_d, m_d, D)
                    for j in tl.static_range(TILE):
                        dots = dots + (_per_lane(rows[j].to(tl.float32) * b_q, LANES),)
                b_dots += join(dots, TILE * GROUP)
                b_squares += join(squares, TILE)
            dots = joined_sums(b_dots, TILE * GROUP)
            squares = joined_sums(b_squares, TILE)
            for j in tl.static_range(TILE):
                source = tile * TILE + j
                if source < n:
                    rstd = tl.rsqrt(squares[j] / D + eps)
                    tl.store(p_rstd + token * (n + 1) + source, rstd)
                    for l in tl.static_range(GROUP):
                        query = group * GROUP + l
                        p_logit = p_logits + p_scalars + source * num_queries + query
                        tl.store(p_logit, dots[l * TILE + j] * rstd, mask=query < num_queries)
    tl.store(p_rstd + token * (n + 1) + n, 1.0)  # no norm follows
    tl.debug_barrier()

    o_i = tl.arange(0, SOURCES)
    o_l = tl.arange(0, QUERIES)
    m_l = o_l < num_queries
    o_scalars = p_scalars + o_i[:, None] * num_queries + o_l[None, :]
    m_scalars = (o_i < n)[:, None] & m_l[None, :]
    b_z = tl.load(p_logits + o_scalars, mask=m_scalars, other=-float("inf"))
    b_top = tl.where(m_l, tl.max(b_z, 0), 0.0)
    b_p = tl.exp(b_z - b_top[None, :])
    b_mass = tl.where(m_l, tl.sum(b_p, 0), 1.0)
    tl.store(p_lse + o_l.to(tl.int64) * num_tokens + token, b_top + tl.log(b_mass), mask=m_l)
    if MIX:
        tl.store(p_weights + o_scalars, b_p / b_mass[None, :], mask=m_scalars)
        tl.debug_barrier()

        for group in tl.range(0, num_groups):
            for start in tl.range(0, D, BLOCK):
                o_d = start + o_chunk
                m_d = o_d < D
                reads = ()
                for _ in tl.static_range(GROUP):
                    reads = reads + (tl.zeros([BLOCK], tl.float32),)
                for tile in tl.range(0, num_tiles(n, COUNT, TILE)):
                    rows = load_rows(p_sources, tile, token * D + o_d, m_d, COUNT, TILE, p_like)
                    for j in tl.static_range(TILE):
                        source = tile * TILE + j
                        sums = ()
                        for l in tl.static_range(GROUP):
                            query = group * GROUP + l
                            p_weight = p_weights + p_scalars + source * num_queries + query
                            weight = tl.load(p_weight, mask=(source < n) & (query < num_queries), other=0.0)
                            sums = sums + (reads[l] + weight * rows[j].to(tl.float32),)
                        reads = sums
                for l in tl.static_range(GROUP):
                    if group * GROUP + l < num_queries:
                        p_out = row_pointer(p_outs, group, l, OUTS, GROUP, p_like)
                        tl.store(p_out + token * D + o_d, reads[l].to(p_like.dtype.element_ty), mask=m_d)


@triton.jit(do_not_specialize=["n", "num_queries", "num_tokens"])
def inter_block_backward_wide(
    p_sources, p_later, p_dsources, p_douts, p_q, p_logits, p_rstd, p_lse, p_dlse, p_weights, p_along_query,
    p_along_row, n, num_queries, num_tokens,
    D: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr, COUNT: tl.constexpr, TILE: tl.constexpr,
    OUTS: tl.constexpr, GROUP: tl.constexpr, SOURCES: tl.constexpr, QUERIES: tl.constexpr, CHAINED: tl.constexpr,
    p_like,
):  # fmt: skip
    """p_along_query: [T, n, S], the c_il that `query_gradient` needs. p_weights [T, n, S] and p_along_row [T, n] only
    carry p_il and e_i between the steps."""
    token = tl.program_id(0).to(tl.int64)
    num_groups = tl.cdiv(num_queries, GROUP)
    o_chunk = tl.arange(0, BLOCK)
    p_scalars = token * n * num_queries

    for tile in tl.range(0, num_tiles(n, COUNT, TILE)):
        for group in tl.range(0, num_groups):
            b_dots = _zeros(LANES, TILE * GROUP)
            for start in tl.range(0, D, BLOCK):
                o_d = start + o_chunk
                m_d = o_d < D
                rows = load_rows(p_sources, tile, token * D + o_d, m_d, COUNT, TILE, p_like)
                douts = load_rows(p_douts, group, token * D + o_d, m_d, OUTS, GROUP, p_like)
                dots = ()
                for l in tl.static_range(GROUP):
                    for j in tl.static_range(TILE):
                        dots = dots + (_per_lane(rows[j].to(tl.float32) * douts[l].to(tl.float32), LANES),)
                b_dots += join(dots, TILE * GROUP)
            dots = joined_sums(b_dots, TILE * GROUP)
            for j in tl.static_range(TILE):
                source = tile * TILE + j
                for l in tl.static_range(GROUP):
                    query = group * GROUP + l
                    p_dot = p_along_query + p_scalars + source * num_queries + query
                    tl.store(p_dot, dots[l * TILE + j], mask=(source < n) & (query < num_queries))
    tl.debug_barrier()

    o_i = tl.arange(0, SOURCES)
    o_l = tl.arange(0, QUERIES)
    m_i = o_i < n
    m_l = o_l < num_queries
    o_scalars = p_scalars + o_i[:, None] * num_queries + o_l[None, :]
    m_scalars = m_i[:, None] & m_l[None, :]
    o_token = o_l.to(tl.int64) * num_tokens + token
    b_z = tl.load(p_logits + o_scalars, mask=m_scalars, other=0.0)
    b_p = tl.exp(b_z - tl.load(p_lse + o_token, mask=m_l, other=0.0)[None, :])
    b_p = tl.where(m_scalars, b_p, 0.0)
    b_dots = tl.load(p_along_query + o_scalars, mask=m_scalars, other=0.0)
    tl.debug_barrier()  # all warps have loaded what is overwritten below
    b_dlse = tl.load(p_dlse + o_token, mask=m_l, other=0.0)
    b_rstd = tl.load(p_rstd + token * (n + 1) + o_i, mask=m_i, other=0.0)
    b_dz = b_p * (b_dots + (b_dlse - tl.sum(b_p * b_dots, 0))[None, :])
    tl.store(p_weights + o_scalars, b_p, mask=m_scalars)
    tl.store(p_along_query + o_scalars, b_dz * b_rstd[:, None], mask=m_scalars)
    tl.store(p_along_row + token * n + o_i, tl.sum(b_dz * b_z, 1) * b_rstd * b_rstd / D, mask=m_i)
    tl.debug_barrier()

    for start in tl.range(0, D, BLOCK):
        o_d = start + o_chunk
        m_d = o_d < D
        o_row = token * D + o_d
        for tile in tl.range(0, num_tiles(n, COUNT, TILE)):
            rows = load_rows(p_sources, tile, o_row, m_d, COUNT, TILE, p_like)
            gradients = ()
            for j in tl.static_range(TILE):
                source = tile * TILE + j
                along_row = tl.load(p_along_row + token * n + source, mask=source < n, other=0.0)
                gradients = gradients + (rows[j].to(tl.float32) * -along_row,)
            for group in tl.range(0, num_groups):
                douts = load_rows(p_douts, group, o_row, m_d, OUTS, GROUP, p_like)
                for l in tl.static_range(GROUP):
                    query = group * GROUP + l
                    b_q = load_folded(p_q, query, num_queries, o_d, m_d, D)
                    sums = ()
                    for j in tl.static_range(TILE):
                        source = tile * TILE + j
                        o_scalar = p_scalars + source * num_queries + query
                        inside = (source < n) & (query < num_queries)
                        weight = tl.load(p_weights + o_scalar, mask=inside, other=0.0)
                        along_query = tl.load(p_along_query + o_scalar, mask=inside, other=0.0)
                        sums = sums + (gradients[j] + weight * douts[l].to(tl.float32) + along_query * b_q,)
                    gradients = sums
            for j in tl.static_range(TILE):
                if j == 0 or tile * TILE + j < n:  # a tile has at least one source
                    store_gradient(gradients[j], p_later, p_dsources, tile, j, o_row, m_d, COUNT, TILE, CHAINED, p_like)


def fold(queries: Tensor, key_norms: Tensor) -> Tensor:
    return (queries.float() * key_norms.float()).contiguous()


def _constants(config: ChunkConfig, sources: list[Tensor], num_queries: int, count: int, outs: int) -> dict[str, Any]:
    """What both kernels are compiled for, and how they are launched."""
    return dict(
        D=sources[0].shape[-1], BLOCK=config.BLOCK, LANES=config.LANES, COUNT=count, TILE=config.TILE, OUTS=outs,
        GROUP=config.GROUP, SOURCES=triton.next_power_of_2(len(sources)), QUERIES=triton.next_power_of_2(num_queries),
        p_like=sources[0], num_warps=config.num_warps, maxnreg=config.maxnreg, device=sources[0].device,
    )  # fmt: skip


def wide_reads(
    q: Tensor, sources: list[Tensor], eps: float, outs: list[Tensor], lse: Tensor, logits: Tensor, rstd: Tensor,
) -> None:  # fmt: skip
    """Fills outs (S reads, or none: for one source they are not written), lse [S, ...], logits [..., n, S] and rstd
    [..., n + 1]. q: folded queries, [S, D] fp32."""
    n, num_queries = len(sources), q.shape[0]
    num_tokens = rstd.numel() // (n + 1)
    config = chunk_config(sources[0], n, num_queries, backward=False)
    p_sources, p_outs = tensor_list(sources, config.TILE), tensor_list(outs or sources[:1], config.GROUP)
    launch(
        inter_block_forward_wide, (num_tokens,),
        p_sources.pointers, p_outs.pointers, q, logits, torch.empty_like(logits) if outs else None, rstd, lse, n,
        num_queries, num_tokens, eps,
        MIX=len(outs) > 0, **_constants(config, sources, num_queries, p_sources.COUNT, p_outs.COUNT),
    )  # fmt: skip


def wide_coefficients(
    q: Tensor, sources: list[Tensor], lse: Tensor, logits: Tensor, rstd: Tensor, douts: list[Tensor], dlse: Tensor,
    later: list[Tensor], dsources: list[Tensor],
) -> Tensor:  # fmt: skip
    """Fills dsources; the coefficients c [..., n, S] of dq.

    q: folded queries, [S, D] fp32; later: what is added to dsources, or nothing."""
    n, num_queries = len(sources), q.shape[0]
    num_tokens = rstd.numel() // (n + 1)
    config = chunk_config(sources[0], n, num_queries, backward=True)
    p_sources = tensor_list(sources, config.TILE)
    p_douts = tensor_list(douts, config.GROUP)
    along_query = torch.empty_like(logits)
    launch(
        inter_block_backward_wide, (num_tokens,),
        p_sources.pointers, tensor_list(later, config.TILE).pointers if later else None,
        tensor_list(dsources, config.TILE).pointers, p_douts.pointers, q, logits, rstd, lse, dlse,
        torch.empty_like(logits), along_query, rstd.new_empty((num_tokens, n)), n, num_queries, num_tokens,
        CHAINED=len(later) > 0, **_constants(config, sources, num_queries, p_sources.COUNT, p_douts.COUNT),
    )  # fmt: skip
    return along_query
