"""Triton kernels of phase 1: the reads of all S layers of a block over the n finished blocks (paper section 4).

With q_l = w_l * g_l, r_i = rsqrt(mean(v_i^2) + eps), z_il = <q_l, v_i> r_i and p_l = softmax(z_l):

    o_l = sum_i p_il v_i,   lse_l = logsumexp(z_l)

The first layer of a block reads nothing else, so its read can leave with its scale and its norm, RMSNorm(scale o_0).
A program takes one token at a time and holds its rows in registers, in their own dtype. Rows moved a token: n + S.
`inter_block_wide` serves more queries than four, more sources and wider rows; in decoding, where programs are few,
reads are made here all the same, with sources in tiles. The backward pass is `inter_block_backward`.
"""

# Triton compiles tuple concatenation but not unpacking, and its tuples grow.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment, misc, var-annotated"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .chain import called, handed_on, left_by_later_readers, or_zeros
from .inter_block_backward import inter_block_gradients, inter_block_gradients_op, rows_fit
from .inter_block_wide import fold, wide_reads
from .launch import dense, dense_or_none, even_share, few_tokens, launch, row_config, tensor_list
from .lists import dots, load_folded, load_rows, num_tiles, row_pointer, squares, sums


@triton.jit
def _logits_of_tile(
    p_logits, p_rstd, p_q, tile, group, rows, n, num_queries, eps, o_d, m_d,
    D: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, TILE: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Stores what backward needs of a tile and a group; returns the logits, (l, j) at l * TILE + j, -inf past the n-th
    source."""
    parts = squares(rows, TILE, LANES, VECTOR)
    for l in tl.static_range(GROUP):
        parts = parts + dots(rows, load_folded(p_q, group * GROUP + l, num_queries, o_d, m_d, D), TILE, LANES, VECTOR)
    totals = sums(parts, TILE * (1 + GROUP))
    rstds = ()
    for j in tl.static_range(TILE):
        source = tile * TILE + j
        rstds = rstds + (tl.rsqrt(totals[j] / D + eps),)
        tl.store(p_rstd + source, rstds[j], mask=source < n)
    logits = ()
    for l in tl.static_range(GROUP):
        query = group * GROUP + l
        for j in tl.static_range(TILE):
            source = tile * TILE + j
            logit = tl.where(source < n, totals[TILE * (1 + l) + j] * rstds[j], -float("inf"))
            tl.store(p_logits + source * num_queries + query, logit, mask=(source < n) & (query < num_queries))
            logits = logits + (logit,)
    return logits


@triton.jit
def _add_tile(b_read, top, mass, rows, logits, l: tl.constexpr, TILE: tl.constexpr):
    """Query l's online softmax over one more tile."""
    new_top = top
    for j in tl.static_range(TILE):
        new_top = tl.maximum(new_top, logits[l * TILE + j])
    kept = tl.exp(top - new_top)
    mass = mass * kept
    b_read = b_read * kept
    for j in tl.static_range(TILE):
        p = tl.exp(logits[l * TILE + j] - new_top)
        mass += p
        b_read += p * rows[j].to(tl.float32)
    return b_read, new_top, mass


@triton.jit
def _store_read(
    p_outs, p_lse, p_weight, p_norm_rstd, group, l: tl.constexpr, b_read, top, mass, token, num_queries, num_tokens,
    scale, norm_eps, o_d, o_row, m_d,
    D: tl.constexpr, OUTS: tl.constexpr, GROUP: tl.constexpr, MIX: tl.constexpr, NORM: tl.constexpr,
    AFFINE: tl.constexpr, p_like,
):  # fmt: skip
    query = group * GROUP + l
    if query < num_queries:
        tl.store(p_lse + query.to(tl.int64) * num_tokens + token, top + tl.log(mass))
        if l == 0:  # noqa: SIM102 (known when the kernel is compiled)
            if query == 0:
                norm_rstd = 1.0
                if NORM:
                    b_x = b_read * (scale / mass)
                    norm_rstd = tl.rsqrt(tl.sum(b_x * b_x, 0) / D + norm_eps)
                    b_x = b_x * norm_rstd
                    if AFFINE:
                        b_x = b_x * tl.load(p_weight + o_d, mask=m_d, other=0.0).to(tl.float32)
                    p_out = row_pointer(p_outs, 0, 0, OUTS, GROUP if MIX else 1, p_like)
                    tl.store(p_out + o_row, b_x.to(p_like.dtype.element_ty), mask=m_d)
                tl.store(p_norm_rstd, norm_rstd)
        if MIX:  # noqa: SIM102
            if (not (NORM and l == 0)) or query > 0:
                p_out = row_pointer(p_outs, group, l, OUTS, GROUP, p_like)
                tl.store(p_out + o_row, (b_read / mass).to(p_like.dtype.element_ty), mask=m_d)


@triton.jit(do_not_specialize=["n", "num_queries", "num_tokens", "groups_per_program"])
def inter_block_forward(
    p_sources, p_outs, p_q, p_weight, p_logits, p_rstd, p_lse, n, num_queries, num_tokens, groups_per_program, scale,
    eps, norm_eps,
    D: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, COUNT: tl.constexpr,
    TILE: tl.constexpr, OUTS: tl.constexpr, GROUP: tl.constexpr, MIX: tl.constexpr, NORM: tl.constexpr,
    AFFINE: tl.constexpr, p_like,
):  # fmt: skip
    """p_q: [S, D] fp32; p_logits: [T, n, S]; p_rstd: [T, n + 1], the last of the first read's norm; p_lse: [S, T].
    MIX false (n = 1): o_l is the source itself and not written, but for the first with its norm."""
    token = tl.program_id(0).to(tl.int64)
    first_group = tl.program_id(1) * groups_per_program
    last_group = tl.minimum(first_group + groups_per_program, tl.cdiv(num_queries, GROUP))
    o_d = tl.arange(0, BLOCK)
    m_d = o_d < D
    o_row = token * D + o_d
    p_logits += token * n * num_queries
    p_rstd += token * (n + 1)
    b_zeros = tl.zeros([BLOCK], tl.float32)

    if COUNT == TILE:
        rows = load_rows(p_sources, 0, o_row, m_d, COUNT, TILE, p_like)
        for group in tl.range(first_group, last_group):
            logits = _logits_of_tile(
                p_logits, p_rstd, p_q, 0, group, rows, n, num_queries, eps, o_d, m_d, D, LANES, VECTOR, TILE, GROUP
            )
            for l in tl.static_range(GROUP):
                b_read, top, mass = _add_tile(b_zeros, -float("inf"), 0.0, rows, logits, l, TILE)
                _store_read(
                    p_outs, p_lse, p_weight, p_rstd + n, group, l, b_read, top, mass, token, num_queries, num_tokens,
                    scale, norm_eps, o_d, o_row, m_d, D, OUTS, GROUP, MIX, NORM, AFFINE, p_like,
                )  # fmt: skip
    else:
        for group in tl.range(first_group, last_group):
            reads = (b_zeros,) * GROUP
            tops = ()
            masses = ()
            for _ in tl.static_range(GROUP):
                tops = tops + (-float("inf"),)
                masses = masses + (0.0,)
            for tile in tl.range(0, num_tiles(n, COUNT, TILE)):
                rows = load_rows(p_sources, tile, o_row, m_d, COUNT, TILE, p_like)
                logits = _logits_of_tile(
                    p_logits, p_rstd, p_q, tile, group, rows, n, num_queries, eps, o_d, m_d,
                    D, LANES, VECTOR, TILE, GROUP,
                )  # fmt: skip
                new_reads = ()
                new_tops = ()
                new_masses = ()
                for l in tl.static_range(GROUP):
                    b_read, top, mass = _add_tile(reads[l], tops[l], masses[l], rows, logits, l, TILE)
                    new_reads = new_reads + (b_read,)
                    new_tops = new_tops + (top,)
                    new_masses = new_masses + (mass,)
                reads = new_reads
                tops = new_tops
                masses = new_masses
            for l in tl.static_range(GROUP):
                _store_read(
                    p_outs, p_lse, p_weight, p_rstd + n, group, l, reads[l], tops[l], masses[l], token, num_queries,
                    num_tokens, scale, norm_eps, o_d, o_row, m_d, D, OUTS, GROUP, MIX, NORM, AFFINE, p_like,
                )  # fmt: skip


def norm_fits(source: Tensor, n: int, num_queries: int, backward: bool) -> bool:
    """Whether the first read can come with its norm."""
    return rows_fit(source, n, num_queries) or (not backward and few_tokens(source.numel() // source.shape[-1]))


def inter_block(
    queries: Tensor, key_norms: Tensor, sources: list[Tensor], weight: Tensor | None, eps: float,
    norm_eps: float | None, scale: float, mix: bool,
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:  # fmt: skip
    """(S reads [..., D], lse [S, ...], logits [..., n, S], rstd [..., n + 1]). norm_eps: a norm follows the first read,
    which is returned with its scale and norm. mix False, for one source: of the reads, which are the source, only the
    one with a norm is returned."""
    sources = [dense(source) for source in sources]
    outs, lse, logits, rstd = _inter_block_outputs(queries, sources, norm_eps, mix)
    n, num_queries = len(sources), queries.shape[0]
    num_tokens = rstd.numel() // (n + 1)
    if num_tokens == 0:
        return outs, lse, logits, rstd
    q = fold(queries, key_norms)
    few = few_tokens(num_tokens)
    if not (few or rows_fit(sources[0], n, num_queries)):
        assert norm_eps is None, "the first read comes with its norm only from the kernel here"
        wide_reads(q, sources, eps, outs, lse, logits, rstd)
        return outs, lse, logits, rstd
    config = row_config("inter_block_forward", sources[0], num_tokens, n)
    group = even_share(num_queries, 2) if few else num_queries
    num_groups = triton.cdiv(num_queries, group)
    groups_per_program = 1 if few else num_groups
    p_sources = tensor_list(sources, config.TILE)
    p_outs = tensor_list(outs or sources[:1], group if mix else 1)
    launch(
        inter_block_forward, (num_tokens, triton.cdiv(num_groups, groups_per_program)),
        p_sources.pointers, p_outs.pointers, q, dense_or_none(weight), logits, rstd, lse, n, num_queries, num_tokens,
        groups_per_program, scale, eps, norm_eps or 0.0,
        D=sources[0].shape[-1], BLOCK=config.BLOCK, LANES=config.LANES, VECTOR=config.VECTOR, COUNT=p_sources.COUNT,
        TILE=config.TILE, OUTS=p_outs.COUNT, GROUP=group, MIX=mix, NORM=norm_eps is not None, AFFINE=weight is not None,
        p_like=sources[0], num_warps=config.num_warps, device=sources[0].device,
    )  # fmt: skip
    return outs, lse, logits, rstd


def _inter_block_outputs(
    queries: Tensor, sources: list[Tensor], norm_eps: float | None, mix: bool
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    n, num_queries, first = len(sources), queries.shape[0], sources[0]
    leading = first.shape[:-1]
    outs = [first.new_empty(first.shape) for _ in range(num_queries if mix else norm_eps is not None)]
    lse = first.new_empty((num_queries, *leading), dtype=torch.float32)
    return outs, lse, lse.new_empty((*leading, n, num_queries)), lse.new_empty((*leading, n + 1))


inter_block_op = torch.library.custom_op("attnres::inter_block", inter_block, mutates_args=())


@inter_block_op.register_fake
def _(queries, key_norms, sources, weight, eps, norm_eps, scale, mix):  # type: ignore[no-untyped-def]
    return _inter_block_outputs(queries, sources, norm_eps, mix)


class InterBlock(torch.autograd.Function):
    """S reads, their log-sum-exps [S, ...] and the sources. norm_eps: the first read comes with its scale and norm. The
    read of one source is that source, by every query."""

    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        key_norms: Tensor,
        weight: Tensor | None,
        eps: float,
        norm_eps: float | None,
        scale: float,
        *sources: Tensor,
    ) -> tuple[Tensor, ...]:
        outs, lse, logits, rstd = called(inter_block, inter_block_op)(
            queries, key_norms, list(sources), weight, eps, norm_eps, scale, len(sources) > 1
        )
        ctx.norm_eps, ctx.scale, ctx.num_queries = norm_eps, scale, len(queries)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(queries, key_norms, weight, lse, logits, rstd, *sources)
        if len(sources) == 1:
            outs = [*outs, *(sources[0].view_as(sources[0]) for _ in range(len(queries) - len(outs)))]
        return *outs, lse, *handed_on(sources)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:  # type: ignore[override]
        queries, key_norms, weight, lse, logits, rstd, *sources = ctx.saved_tensors
        douts, dlse, *later = gradients[: ctx.num_queries], *gradients[ctx.num_queries :]
        dqueries, dkey_norms, dsources, dweight = called(inter_block_gradients, inter_block_gradients_op)(
            queries,
            key_norms,
            sources,
            weight,
            lse,
            logits,
            rstd,
            or_zeros(douts, sources[0]),
            *or_zeros([dlse], lse),
            left_by_later_readers(later, sources[0]),
            ctx.norm_eps,
            ctx.scale,
        )
        return dqueries, dkey_norms, None if weight is None else dweight, None, None, None, *dsources
