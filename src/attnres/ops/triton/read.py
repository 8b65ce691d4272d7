"""Triton kernels of one read over depth, with the RMSNorm that follows folded in.

With q = w * g, r_i = rsqrt(mean(v_i^2) + eps), z_i = <q, v_i> r_i and p = softmax(z):

    h = sum_i p_i v_i,   x = scale * h   or   x = RMSNorm(scale * h)

A read may go on from an earlier one over other sources (phase 1's): its result and log-sum-exp are then one more source
with a given logit, the prior.

Forward: sources stream once through registers under an online softmax. It reads n rows a token and writes one, and
keeps 2n + 2 scalars a token: z_i, r_i, their log-sum-exp and the reciprocal root of the norm that follows.

Backward: with these the weights are known before any row is, so that h and all sums over a row need one barrier. With
y = dx * weight, t = scale * rstd and k = t^2 <y, h> / D, the norm's gradient is dh = t (y - k h), hence

    <dh, v_i> = t (<y, v_i> - k <h, v_i>),   dz_i = p_i (<dh, v_i> - sum_j p_j <dh, v_j>)
    dv_i = p_i dh + dz_i r_i q - (dz_i z_i r_i^2 / D) v_i        added to what later readers left for the source
    dq   = sum_tokens sum_i dz_i r_i v_i

Reads 2n + 1 rows a token and writes n. Rows stay in registers in their own dtype; sources that do not fit are taken in
tiles and read again, from L2 unless there are very many. dq and the gradient of the norm's weight are summed over each
program's tokens in registers; `reduce` sums the programs in a fixed order.
"""

# Triton compiles tuple concatenation but not unpacking, and its tuples grow.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .chain import called, handed_on, left_by_later_readers, or_zeros
from .launch import dense, dense_or_none, launch, row_config, tensor_list
from .lists import dots, load_query, load_rows, num_tiles, squares, store_gradient, sums
from .reduce import sum_partials


@triton.jit(do_not_specialize=["n"])
def read_forward(
    p_sources, p_prior, p_prior_lse, p_query, p_key_norm, p_weight, p_x, p_stats, n, scale, eps, norm_eps,
    D: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, COUNT: tl.constexpr,
    TILE: tl.constexpr, PRIOR: tl.constexpr, NORM: tl.constexpr, AFFINE: tl.constexpr,
):  # fmt: skip
    """p_stats: [T, 2n + 2], logits, reciprocal norms of the sources, log-sum-exp, reciprocal norm of h."""
    token = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BLOCK)
    m_d = o_d < D
    o_row = token * D + o_d
    p_stats += token * (2 * n + 2)

    b_q = load_query(p_query, p_key_norm, o_d, m_d)
    if PRIOR:
        b_h = tl.load(p_prior + o_row, mask=m_d, other=0.0).to(tl.float32)
        top = tl.load(p_prior_lse + token)
        mass = 1.0
    else:
        b_h = tl.zeros([BLOCK], tl.float32)
        top = -float("inf")
        mass = 0.0
    for tile in tl.range(0, num_tiles(n, COUNT, TILE)):
        rows = load_rows(p_sources, tile, o_row, m_d, COUNT, TILE, p_x)
        totals = sums(squares(rows, TILE, LANES, VECTOR) + dots(rows, b_q, TILE, LANES, VECTOR), 2 * TILE)
        logits = ()
        new_top = top
        for j in tl.static_range(TILE):
            source = tile * TILE + j
            rstd = tl.rsqrt(totals[j] / D + eps)
            logit = tl.where(source < n, totals[TILE + j] * rstd, -float("inf"))
            tl.store(p_stats + source, logit, mask=source < n)
            tl.store(p_stats + n + source, rstd, mask=source < n)
            logits = logits + (logit,)
            new_top = tl.maximum(new_top, logit)
        kept = tl.exp(top - new_top)
        mass = mass * kept
        b_h = b_h * kept
        for j in tl.static_range(TILE):
            p = tl.exp(logits[j] - new_top)
            mass += p
            b_h += p * rows[j].to(tl.float32)
        top = new_top

    b_x = b_h * (scale / mass)
    norm_rstd = 1.0
    if NORM:
        norm_rstd = tl.rsqrt(tl.sum(b_x * b_x, 0) / D + norm_eps)
        b_x = b_x * norm_rstd
        if AFFINE:
            b_x = b_x * tl.load(p_weight + o_d, mask=m_d, other=0.0).to(tl.float32)
    tl.store(p_x + o_row, b_x.to(p_x.dtype.element_ty), mask=m_d)
    tl.store(p_stats + 2 * n, top + tl.log(mass))
    tl.store(p_stats + 2 * n + 1, norm_rstd)


@triton.jit
def _mix(b_h, rows, p_logits, tile, n, lse, TILE: tl.constexpr):
    """b_h + sum_j p_j v_j over a tile, and the weights, zero past the n-th source."""
    weights = ()
    for j in tl.static_range(TILE):
        source = tile * TILE + j
        p = tl.exp(tl.load(p_logits + source, mask=source < n, other=-float("inf")) - lse)
        b_h += p * rows[j].to(tl.float32)
        weights = weights + (p,)
    return b_h, weights


@triton.jit
def _store_gradients(
    p_later, p_dsources, p_logits, tile, n, o_row, m_d, rows, weights, along_rows, delta, b_dh, b_q, b_dq,
    D: tl.constexpr, COUNT: tl.constexpr, TILE: tl.constexpr, CHAINED: tl.constexpr, p_like,
):  # fmt: skip
    """Writes the gradients of a tile's sources; returns b_dq with the tile's part added. along_rows: <dh, v_j>."""
    for j in tl.static_range(TILE):
        source = tile * TILE + j
        if COUNT == TILE or source < n:
            dz = weights[j] * (along_rows[j] - delta)
            logit = tl.load(p_logits + source)
            rstd = tl.load(p_logits + n + source)
            along_query = dz * rstd
            along_row = dz * logit * rstd * rstd / D
            b_v = rows[j].to(tl.float32)
            b_dq += along_query * b_v
            b_dv = weights[j] * b_dh + along_query * b_q - along_row * b_v
            store_gradient(b_dv, p_later, p_dsources, tile, j, o_row, m_d, COUNT, TILE, CHAINED, p_like)
    return b_dq


@triton.jit(do_not_specialize=["n", "num_tokens"])
def read_backward(
    p_sources, p_later, p_dsources, p_prior, p_prior_lse, p_dprior, p_dprior_lse, p_query, p_key_norm, p_weight, p_dx,
    p_stats, p_partial, n, num_tokens, scale, norm_eps,
    D: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, COUNT: tl.constexpr,
    TILE: tl.constexpr, PRIOR: tl.constexpr, NORM: tl.constexpr, AFFINE: tl.constexpr, CHAINED: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """p_partial: [programs, 1 + AFFINE, D], this program's sums of dq and of the norm weight's gradient."""
    SUMS: tl.constexpr = (TILE + PRIOR) * (1 + NORM)
    o_d = tl.arange(0, BLOCK)
    m_d = o_d < D
    b_q = load_query(p_query, p_key_norm, o_d, m_d)
    b_dq = tl.zeros([BLOCK], tl.float32)
    b_dweight = tl.zeros([BLOCK], tl.float32)

    for token in tl.range(tl.program_id(0).to(tl.int64), num_tokens, tl.num_programs(0), num_stages=STAGES):
        o_row = token * D + o_d
        p_logits = p_stats + token * (2 * n + 2)
        lse = tl.load(p_logits + 2 * n)
        norm_rstd = tl.load(p_logits + 2 * n + 1)
        t = scale * norm_rstd
        k = 0.0
        b_dx = tl.load(p_dx + o_row, mask=m_d, other=0.0).to(tl.float32)
        b_y = b_dx
        if AFFINE:
            b_y = b_dx * tl.load(p_weight + o_d, mask=m_d, other=0.0).to(tl.float32)
        b_h = tl.zeros([BLOCK], tl.float32)
        if PRIOR:
            b_prior = tl.load(p_prior + o_row, mask=m_d, other=0.0)
            prior_weight = tl.exp(tl.load(p_prior_lse + token) - lse)
            b_h += prior_weight * b_prior.to(tl.float32)

        if COUNT == TILE:
            rows = load_rows(p_sources, 0, o_row, m_d, COUNT, TILE, p_dx)
            b_h, weights = _mix(b_h, rows, p_logits, 0, COUNT, lse, TILE)
            operands = rows
            if PRIOR:
                operands = rows + (b_prior,)
            parts = dots(operands, b_y, TILE + PRIOR, LANES, VECTOR)
            if NORM:
                parts = parts + dots(operands, b_h, TILE + PRIOR, LANES, VECTOR)
            totals = sums(parts, SUMS)
            if NORM:  # <y, h> from its parts
                along = 0.0
                for j in tl.static_range(TILE):
                    along += weights[j] * totals[j]
                if PRIOR:
                    along += prior_weight * totals[TILE]
                k = t * t * along / D
            along_rows = ()
            # sum_j p_j <dh, v_j> is <dh, h> and cancels better where one source has all the weight
            delta = 0.0
            for j in tl.static_range(TILE):
                dot = t * totals[j]
                if NORM:
                    dot -= t * k * totals[TILE + PRIOR + j]
                along_rows = along_rows + (dot,)
                delta += weights[j] * dot
            if PRIOR:
                dot_of_prior = t * totals[TILE]
                if NORM:
                    dot_of_prior -= t * k * totals[2 * TILE + 1]
                delta += prior_weight * dot_of_prior
            b_dh = t * (b_y - k * b_h)
            b_dq = _store_gradients(
                p_later, p_dsources, p_logits, 0, COUNT, o_row, m_d, rows, weights, along_rows, delta, b_dh, b_q, b_dq,
                D, COUNT, TILE, CHAINED, p_dx,
            )  # fmt: skip
        else:
            for tile in tl.range(0, num_tiles(n, COUNT, TILE)):
                rows = load_rows(p_sources, tile, o_row, m_d, COUNT, TILE, p_dx)
                b_h, _ = _mix(b_h, rows, p_logits, tile, n, lse, TILE)
            along = tl.sum(b_y * b_h, 0)
            delta = t * along
            if NORM:
                k = t * t * along / D
                # <dh, h>: the norm took from dh what lies along h, up to norm_eps
                delta = t * along * (norm_eps * norm_rstd * norm_rstd)
            b_dh = t * (b_y - k * b_h)
            for tile in tl.range(0, num_tiles(n, COUNT, TILE)):
                rows = load_rows(p_sources, tile, o_row, m_d, COUNT, TILE, p_dx)
                along_rows = sums(dots(rows, b_dh, TILE, LANES, VECTOR), TILE)
                _, weights = _mix(b_h, rows, p_logits, tile, n, lse, TILE)
                b_dq = _store_gradients(
                    p_later, p_dsources, p_logits, tile, n, o_row, m_d, rows, weights, along_rows, delta, b_dh, b_q,
                    b_dq, D, COUNT, TILE, CHAINED, p_dx,
                )  # fmt: skip
            if PRIOR:
                dot_of_prior = tl.sum(b_dh * b_prior.to(tl.float32), 0)
        if AFFINE:
            b_dweight += b_dx * (t * b_h)
        if PRIOR:
            tl.store(p_dprior + o_row, (prior_weight * b_dh).to(p_dprior.dtype.element_ty), mask=m_d)
            tl.store(p_dprior_lse + token, prior_weight * (dot_of_prior - delta))

    p_row = p_partial + tl.program_id(0) * (1 + AFFINE) * D + o_d
    tl.store(p_row, b_dq, mask=m_d)
    if AFFINE:
        tl.store(p_row + D, b_dweight, mask=m_d)


def read(
    query: Tensor, key_norm: Tensor, sources: list[Tensor], prior: Tensor | None, prior_lse: Tensor | None,
    weight: Tensor | None, eps: float, norm_eps: float | None, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(x [..., D], what backward needs [..., 2n + 2]: logits, reciprocal norms, log-sum-exp, norm). norm_eps None: no
    norm follows. prior [..., D] and its log-sum-exp [...]: the read that this one goes on from."""
    sources = [dense(source) for source in sources]
    x, stats = _read_outputs(sources)
    width, num_tokens = x.shape[-1], prior_lse.numel() if prior_lse is not None else x.numel() // x.shape[-1]
    if num_tokens == 0:
        return x, stats
    config = row_config("read_forward", x, num_tokens, len(sources))
    p_sources = tensor_list(sources, config.TILE)
    launch(
        read_forward, (num_tokens,),
        p_sources.pointers, dense_or_none(prior), dense_or_none(prior_lse), dense(query), dense(key_norm),
        dense_or_none(weight), x, stats, len(sources), scale, eps, norm_eps or 0.0,
        D=width, BLOCK=config.BLOCK, LANES=config.LANES, VECTOR=config.VECTOR, COUNT=p_sources.COUNT, TILE=config.TILE,
        PRIOR=prior is not None, NORM=norm_eps is not None, AFFINE=weight is not None, num_warps=config.num_warps,
        device=x.device,
    )  # fmt: skip
    return x, stats


read_op = torch.library.custom_op("attnres::read", read, mutates_args=())


@read_op.register_fake
def _(query, key_norm, sources, prior, prior_lse, weight, eps, norm_eps, scale):  # type: ignore[no-untyped-def]
    return _read_outputs(sources)


def _read_outputs(sources: list[Tensor]) -> tuple[Tensor, Tensor]:
    first = sources[0]
    stats = first.new_empty((*first.shape[:-1], 2 * len(sources) + 2), dtype=torch.float32)
    return first.new_empty(first.shape), stats


def read_gradients(
    query: Tensor, key_norm: Tensor, sources: list[Tensor], prior: Tensor | None, prior_lse: Tensor | None,
    weight: Tensor | None, stats: Tensor, dx: Tensor, later: list[Tensor], norm_eps: float | None, scale: float,
) -> tuple[Tensor, Tensor, list[Tensor], Tensor, Tensor, Tensor]:  # fmt: skip
    """(dquery, dkey_norm, dsources, dprior, dprior_lse, dweight; what there is none of comes back empty). later: what
    is added to dsources, or nothing."""
    sources, later, dx = [dense(source) for source in sources], [dense(g) for g in later], dense(dx)
    query, key_norm, weight = dense(query), dense(key_norm), dense_or_none(weight)
    dsources = [torch.empty_like(source) for source in sources]
    dprior, dprior_lse = _prior_gradients(dx, prior)
    width, num_tokens = dx.shape[-1], dx.numel() // dx.shape[-1]
    config = row_config("read_backward", dx, num_tokens, len(sources))
    partial = dx.new_empty((config.programs, 1 + (weight is not None), width), dtype=torch.float32)
    if num_tokens == 0:
        partial.zero_()
    else:
        p_sources = tensor_list(sources, config.TILE)
        launch(
            read_backward, (config.programs,),
            p_sources.pointers, tensor_list(later, config.TILE).pointers if later else None,
            tensor_list(dsources, config.TILE).pointers, dense_or_none(prior), dense_or_none(prior_lse),
            None if prior is None else dprior, None if prior is None else dprior_lse, query, key_norm, weight, dx,
            stats, partial, len(sources), num_tokens, scale, norm_eps or 0.0,
            D=width, BLOCK=config.BLOCK, LANES=config.LANES, VECTOR=config.VECTOR, COUNT=p_sources.COUNT,
            TILE=config.TILE, PRIOR=prior is not None, NORM=norm_eps is not None, AFFINE=weight is not None,
            CHAINED=len(later) > 0, STAGES=config.STAGES, num_warps=config.num_warps, device=dx.device,
        )  # fmt: skip
    dquery, dkey_norm, dweight = sum_partials(partial, query, key_norm, weight)
    return dquery, dkey_norm, dsources, dprior, dprior_lse, dweight


read_gradients_op = torch.library.custom_op("attnres::read_backward", read_gradients, mutates_args=())


@read_gradients_op.register_fake
def _(query, key_norm, sources, prior, prior_lse, weight, stats, dx, later, norm_eps, scale):  # type: ignore[no-untyped-def]
    dweight = query.new_empty(0, dtype=torch.float32) if weight is None else weight.new_empty(weight.shape)
    return (
        query.new_empty(query.shape),
        key_norm.new_empty(key_norm.shape),
        [source.new_empty(source.shape) for source in sources],
        *_prior_gradients(dx, prior),
        dweight,
    )


def _prior_gradients(dx: Tensor, prior: Tensor | None) -> tuple[Tensor, Tensor]:
    if prior is None:
        return dx.new_empty(0), dx.new_empty(0, dtype=torch.float32)
    return dx.new_empty(dx.shape), dx.new_empty(dx.shape[:-1], dtype=torch.float32)


class Read(torch.autograd.Function):
    """x, what `read` keeps, and the sources if they have later readers. prior, prior_lse: the read that this one goes
    on from, or None.

    A source that nobody reads again is better not handed on: a compiler would make its missing gradient of zeros."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key_norm: Tensor,
        prior: Tensor | None,
        prior_lse: Tensor | None,
        weight: Tensor | None,
        eps: float,
        norm_eps: float | None,
        scale: float,
        hand_on: bool,
        *sources: Tensor,
    ) -> tuple[Tensor, ...]:
        x, stats = called(read, read_op)(query, key_norm, list(sources), prior, prior_lse, weight, eps, norm_eps, scale)
        ctx.norm_eps, ctx.scale = norm_eps, scale
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(stats)
        ctx.save_for_backward(query, key_norm, prior, prior_lse, weight, stats, *sources)
        return x, stats, *(handed_on(sources) if hand_on else ())

    @staticmethod
    def backward(ctx: Any, dx: Tensor | None, _: None, *later: Tensor | None) -> tuple[Any, ...]:  # type: ignore[override]
        query, key_norm, prior, prior_lse, weight, stats, *sources = ctx.saved_tensors
        (dx,) = or_zeros([dx], sources[0])
        left = left_by_later_readers(later, sources[0])
        dquery, dkey_norm, dsources, dprior, dprior_lse, dweight = called(read_gradients, read_gradients_op)(
            query, key_norm, sources, prior, prior_lse, weight, stats, dx, left, ctx.norm_eps, ctx.scale
        )
        of_prior = (None, None) if prior is None else (dprior, dprior_lse)
        return dquery, dkey_norm, *of_prior, None if weight is None else dweight, None, None, None, None, *dsources
