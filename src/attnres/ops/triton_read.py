"""Triton kernels of one read over depth, with the RMSNorm that follows folded in.

With q = w * g, r_i = rsqrt(mean(v_i^2) + eps), z_i = <q, v_i> r_i and p = softmax(z):

    h = sum_i p_i v_i,   x = scale * h   or   x = RMSNorm(scale * h)

Forward: sources stream once through registers under an online softmax. It reads n rows a token and writes one; for
backward it keeps the log-sum-exp of the logits, nothing else.

Backward: h is recomputed. With dh its gradient,

    dz_i = p_i (<dh, v_i> - <dh, h>)
    dv_i = p_i dh + dz_i r_i q - (dz_i z_i r_i^2 / D) v_i        added to what later readers left for the source
    dq   = sum_tokens sum_i dz_i r_i v_i

Reads 2n + 1 rows a token and writes n. Sources that do not fit one tile are read again, from L2 unless there are very
many. dq and the gradient of the norm's weight are summed over each program's tokens in registers; `triton_reduce` sums
the programs in a fixed order.
"""

# Triton compiles tuple concatenation but not unpacking, and its tuples grow.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment"

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_launch import dense, launch, row_config, rows, tile_size
from .triton_reduce import sum_partials
from .triton_rows import load_query, load_rows, num_tiles, store_gradient, sums


@triton.jit
def _products(rows, b_other, TILE: tl.constexpr):
    parts = ()
    for j in tl.static_range(TILE):
        parts = parts + (rows[j] * b_other,)
    return parts


@triton.jit
def _squares(rows, TILE: tl.constexpr):
    parts = ()
    for j in tl.static_range(TILE):
        parts = parts + (rows[j] * rows[j],)
    return parts


@triton.jit
def _logits(squares, dots, tile, n, eps, D: tl.constexpr, TILE: tl.constexpr):
    """Scalar logits of a tile, -inf past the n-th source, and reciprocal norms."""
    logits = ()
    rstds = ()
    for j in tl.static_range(TILE):
        rstd = tl.rsqrt(squares[j] / D + eps)
        logits = logits + (tl.where(tile * TILE + j < n, dots[j] * rstd, -float("inf")),)
        rstds = rstds + (rstd,)
    return logits, rstds


@triton.jit(do_not_specialize=["n"])
def read_forward(
    p_sources,
    p_query,
    p_key_norm,
    p_weight,
    p_x,
    p_lse,
    p_logits,
    n,
    scale,
    eps,
    norm_eps,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    COUNT: tl.constexpr,
    TILE: tl.constexpr,
    NORM: tl.constexpr,
    AFFINE: tl.constexpr,
    LOGITS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BLOCK)
    m_d = o_d < D
    o_row = token * D + o_d

    b_q = load_query(p_query, p_key_norm, o_d, m_d)
    b_h = tl.zeros([BLOCK], tl.float32)
    top = -float("inf")
    mass = 0.0
    for tile in tl.range(0, num_tiles(n, COUNT, TILE)):
        rows = load_rows(p_sources, tile, o_row, m_d, COUNT, TILE, p_x)
        totals = sums(_squares(rows, TILE) + _products(rows, b_q, TILE), 2 * TILE)
        logits, _ = _logits(totals[:TILE], totals[TILE:], tile, n, eps, D, TILE)
        new_top = top
        for j in tl.static_range(TILE):
            new_top = tl.maximum(new_top, logits[j])
            if LOGITS:
                tl.store(p_logits + token * n + tile * TILE + j, logits[j], mask=tile * TILE + j < n)
        kept = tl.exp(top - new_top)
        mass = mass * kept
        b_h = b_h * kept
        for j in tl.static_range(TILE):
            p = tl.exp(logits[j] - new_top)
            mass += p
            b_h += p * rows[j]
        top = new_top

    b_x = b_h * (scale / mass)
    if NORM:
        b_x = b_x * tl.rsqrt(tl.sum(b_x * b_x, 0) / D + norm_eps)
        if AFFINE:
            b_x = b_x * tl.load(p_weight + o_d, mask=m_d, other=0.0).to(tl.float32)
    tl.store(p_x + o_row, b_x.to(p_x.dtype.element_ty), mask=m_d)
    tl.store(p_lse + token, top + tl.log(mass))


@triton.jit
def _mix(b_h, rows, logits, lse, TILE: tl.constexpr):
    for j in tl.static_range(TILE):
        b_h += tl.exp(logits[j] - lse) * rows[j]
    return b_h


@triton.jit
def _source_gradients(
    p_later,
    p_dsources,
    tile,
    n,
    o_row,
    m_d,
    rows,
    logits,
    rstds,
    dots,
    lse,
    delta,
    b_dh,
    b_q,
    b_dq,
    D: tl.constexpr,
    COUNT: tl.constexpr,
    TILE: tl.constexpr,
    CHAINED: tl.constexpr,
    p_like,
):
    """Writes the gradients of a tile's sources; returns b_dq with the tile's part added. dots: <dh, v_j>."""
    for j in tl.static_range(TILE):
        if tile * TILE + j < n:
            p = tl.exp(logits[j] - lse)
            dz = p * (dots[j] - delta)
            along_query = dz * rstds[j]
            along_row = dz * logits[j] * rstds[j] * rstds[j] / D
            b_dq += along_query * rows[j]
            b_dv = p * b_dh + along_query * b_q - along_row * rows[j]
            store_gradient(b_dv, p_later, p_dsources, tile, j, o_row, m_d, COUNT, TILE, CHAINED, p_like)
    return b_dq


@triton.jit(do_not_specialize=["n", "num_tokens"])
def read_backward(
    p_sources,
    p_later,
    p_dsources,
    p_query,
    p_key_norm,
    p_weight,
    p_dx,
    p_lse,
    p_partial,
    n,
    num_tokens,
    scale,
    eps,
    norm_eps,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    COUNT: tl.constexpr,
    TILE: tl.constexpr,
    NORM: tl.constexpr,
    AFFINE: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """p_partial: [programs, 1 + AFFINE, D], this program's sums of dq and of the norm weight's gradient."""
    # two stages: the next token's rows are copied to shared memory meanwhile; with four sources registers run out
    STAGES: tl.constexpr = 2 if COUNT == TILE and TILE < 4 else 1
    o_d = tl.arange(0, BLOCK)
    m_d = o_d < D
    b_dq = tl.zeros([BLOCK], tl.float32)
    b_dweight = tl.zeros([BLOCK], tl.float32)

    for token in tl.range(tl.program_id(0).to(tl.int64), num_tokens, tl.num_programs(0), num_stages=STAGES):
        o_row = token * D + o_d
        lse = tl.load(p_lse + token)
        b_q = load_query(p_query, p_key_norm, o_d, m_d)
        b_h = tl.zeros([BLOCK], tl.float32)
        if COUNT == TILE:
            rows = load_rows(p_sources, 0, o_row, m_d, COUNT, TILE, p_dx)
            totals = sums(_squares(rows, TILE) + _products(rows, b_q, TILE), 2 * TILE)
            logits, rstds = _logits(totals[:TILE], totals[TILE:], 0, COUNT, eps, D, TILE)
            b_h = _mix(b_h, rows, logits, lse, TILE)
        else:
            for tile in tl.range(0, num_tiles(n, COUNT, TILE)):
                rows = load_rows(p_sources, tile, o_row, m_d, COUNT, TILE, p_dx)
                totals = sums(_squares(rows, TILE) + _products(rows, b_q, TILE), 2 * TILE)
                logits, _ = _logits(totals[:TILE], totals[TILE:], tile, n, eps, D, TILE)
                b_h = _mix(b_h, rows, logits, lse, TILE)

        b_dx = tl.load(p_dx + o_row, mask=m_d, other=0.0).to(tl.float32)
        b_dh = b_dx
        if NORM:
            if AFFINE:
                b_dh = b_dx * tl.load(p_weight + o_d, mask=m_d, other=0.0).to(tl.float32)
            b_h = b_h * scale
            square, along = sums((b_h * b_h, b_dh * b_h), 2)
            rstd = tl.rsqrt(square / D + norm_eps)
            if AFFINE:
                b_dweight += b_dx * (b_h * rstd)
            b_dh = (scale * rstd) * (b_dh - b_h * (along * rstd * rstd / D))
            # <dh, h>: the norm took from dh what lies along h, up to norm_eps
            delta = along * rstd * (norm_eps * rstd * rstd)
        else:
            b_dh = b_dx * scale
            delta = tl.sum(b_dh * b_h, 0)

        if COUNT == TILE:
            dots = sums(_products(rows, b_dh, TILE), TILE)
            delta = 0.0  # the same as sum_i p_i <dh, v_i>, which cancels better where one source has all the weight
            for j in tl.static_range(TILE):
                delta += tl.exp(logits[j] - lse) * dots[j]
            b_dq = _source_gradients(
                p_later, p_dsources, 0, COUNT, o_row, m_d, rows, logits, rstds, dots, lse, delta, b_dh, b_q, b_dq,
                D, COUNT, TILE, CHAINED, p_dx,
            )  # fmt: skip
        else:
            for tile in tl.range(0, num_tiles(n, COUNT, TILE)):
                rows = load_rows(p_sources, tile, o_row, m_d, COUNT, TILE, p_dx)
                parts = _squares(rows, TILE) + _products(rows, b_q, TILE) + _products(rows, b_dh, TILE)
                totals = sums(parts, 3 * TILE)
                logits, rstds = _logits(totals[:TILE], totals[TILE : 2 * TILE], tile, n, eps, D, TILE)
                b_dq = _source_gradients(
                    p_later, p_dsources, tile, n, o_row, m_d, rows, logits, rstds, totals[2 * TILE :], lse, delta,
                    b_dh, b_q, b_dq, D, COUNT, TILE, CHAINED, p_dx,
                )  # fmt: skip

    p_row = p_partial + tl.program_id(0) * (1 + AFFINE) * D + o_d
    tl.store(p_row, b_dq, mask=m_d)
    if AFFINE:
        tl.store(p_row + D, b_dweight, mask=m_d)


@torch.library.custom_op("attnres::read", mutates_args=())
def read(
    query: Tensor,
    key_norm: Tensor,
    sources: list[Tensor],
    weight: Tensor | None,
    eps: float,
    norm_eps: float | None,
    scale: float,
    want_logits: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(x [..., D], lse [...], logits [..., n] or empty). norm_eps None: no norm follows."""
    sources = [dense(source) for source in sources]
    x, lse, logits = _read_outputs(sources, want_logits)
    width, num_tokens = x.shape[-1], lse.numel()
    if num_tokens == 0:
        return x, lse, logits
    config = row_config(width, 16, num_tokens, x.device)
    tile = tile_size(len(sources))
    p_sources = rows(sources, tile)
    launch(
        read_forward,
        (num_tokens,),
        p_sources.pointers,
        dense(query),
        dense(key_norm),
        None if weight is None else dense(weight),
        x,
        lse,
        logits,
        len(sources),
        scale,
        eps,
        norm_eps or 0.0,
        D=width,
        BLOCK=config.BLOCK,
        COUNT=p_sources.COUNT,
        TILE=tile,
        NORM=norm_eps is not None,
        AFFINE=weight is not None,
        LOGITS=want_logits,
        num_warps=config.num_warps,
        device=x.device,
    )
    return x, lse, logits


@read.register_fake
def _(query, key_norm, sources, weight, eps, norm_eps, scale, want_logits):  # type: ignore[no-untyped-def]
    return _read_outputs(sources, want_logits)


def _read_outputs(sources: list[Tensor], want_logits: bool) -> tuple[Tensor, Tensor, Tensor]:
    first = sources[0]
    leading = first.shape[:-1]
    x = first.new_empty(first.shape)
    lse = first.new_empty(leading, dtype=torch.float32)
    return x, lse, lse.new_empty((*leading, len(sources)) if want_logits else 0)


@torch.library.custom_op("attnres::read_backward", mutates_args=())
def read_gradients(
    query: Tensor,
    key_norm: Tensor,
    sources: list[Tensor],
    weight: Tensor | None,
    lse: Tensor,
    dx: Tensor,
    later: list[Tensor],
    eps: float,
    norm_eps: float | None,
    scale: float,
) -> tuple[Tensor, Tensor, list[Tensor], Tensor]:
    """(dquery, dkey_norm, dsources, dweight or empty). later: what is added to dsources, or nothing."""
    sources, later, dx = [dense(source) for source in sources], [dense(g) for g in later], dense(dx)
    query, key_norm, weight = dense(query), dense(key_norm), None if weight is None else dense(weight)
    dsources = [torch.empty_like(source) for source in sources]
    width, num_tokens = dx.shape[-1], lse.numel()
    # the loop over tokens keeps sums in registers: half the row a thread
    config = row_config(width, 8, num_tokens, dx.device)
    partial = dx.new_empty((config.programs, 1 + (weight is not None), width), dtype=torch.float32)
    if num_tokens == 0:
        partial.zero_()
    else:
        tile = tile_size(len(sources))
        p_sources = rows(sources, tile)
        launch(
            read_backward,
            (config.programs,),
            p_sources.pointers,
            rows(later, tile).pointers if later else None,
            rows(dsources, tile).pointers,
            query,
            key_norm,
            weight,
            dx,
            dense(lse),
            partial,
            len(sources),
            num_tokens,
            scale,
            eps,
            norm_eps or 0.0,
            D=width,
            BLOCK=config.BLOCK,
            COUNT=p_sources.COUNT,
            TILE=tile if config.BLOCK <= 4096 else 1,
            NORM=norm_eps is not None,
            AFFINE=weight is not None,
            CHAINED=len(later) > 0,
            num_warps=config.num_warps,
            device=dx.device,
        )
    dquery, dkey_norm, dweight = sum_partials(partial, query, key_norm, weight)
    return dquery, dkey_norm, dsources, dweight


@read_gradients.register_fake
def _(query, key_norm, sources, weight, lse, dx, later, eps, norm_eps, scale):  # type: ignore[no-untyped-def]
    dweight = query.new_empty(0, dtype=torch.float32) if weight is None else weight.new_empty(weight.shape)
    return (
        query.new_empty(query.shape),
        key_norm.new_empty(key_norm.shape),
        [source.new_empty(source.shape) for source in sources],
        dweight,
    )
