"""Triton kernels of phase 2: the pending residual add, the merge with phase 1's read and the RMSNorm that follows.

With q = w * g and (o, lse) this layer's read over the finished blocks (paper section 4):

    s = partial + update, rounded to the storage dtype;   r = rsqrt(mean(s^2) + eps);   z = <q, s> r
    a = sigmoid(z - lse);   h = (1 - a) o + a s;   x = scale * h   or   x = RMSNorm(scale * h)

Forward reads three rows a token and writes two (two and one without the add). It keeps three scalars a token for
backward, which recomputes h. Backward, with dh the gradient of h and ds' that of s from its later readers, reads four
rows and writes two:

    dz = a (1 - a) <dh, s - o>,   dlse = -dz,   do = (1 - a) dh
    ds = ds' + a dh + dz r q - (dz z r^2 / D) s        the gradient of partial and of update alike
    dq = sum_tokens dz r s                             one partial row a program, summed by `reduce`
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .chain import called, handed_on, or_zeros
from .launch import dense, dense_or_none, launch, row_config
from .lists import load_query, sums
from .reduce import sum_partials


@triton.jit
def merge_forward(
    p_partial_sum, p_update, p_out, p_lse, p_query, p_key_norm, p_weight, p_sum, p_x, p_stats, scale, eps, norm_eps,
    D: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr, NORM: tl.constexpr, AFFINE: tl.constexpr,
):  # fmt: skip
    """ADD false: s is `p_update` itself and p_sum is not written. p_stats: [T, 3], z, r and the output norm's rstd."""
    token = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BLOCK)
    m_d = o_d < D
    o_row = token * D + o_d

    b_s = tl.load(p_update + o_row, mask=m_d, other=0.0).to(tl.float32)
    if ADD:
        b_s += tl.load(p_partial_sum + o_row, mask=m_d, other=0.0).to(tl.float32)
        b_sum = b_s.to(p_sum.dtype.element_ty)
        tl.store(p_sum + o_row, b_sum, mask=m_d)
        b_s = b_sum.to(tl.float32)
    b_o = tl.load(p_out + o_row, mask=m_d, other=0.0).to(tl.float32)
    lse = tl.load(p_lse + token)

    square, dot = sums((b_s * b_s, b_s * load_query(p_query, p_key_norm, o_d, m_d)), 2)
    rstd = tl.rsqrt(square / D + eps)
    z = dot * rstd
    # both shares from the sigmoid: 1 - a would lose a small one
    b_x = (scale * tl.sigmoid(lse - z)) * b_o + (scale * tl.sigmoid(z - lse)) * b_s
    norm_rstd = 1.0
    if NORM:
        norm_rstd = tl.rsqrt(tl.sum(b_x * b_x, 0) / D + norm_eps)
        b_x = b_x * norm_rstd
        if AFFINE:
            b_x = b_x * tl.load(p_weight + o_d, mask=m_d, other=0.0).to(tl.float32)
    tl.store(p_stats + token * 3, z)
    tl.store(p_stats + token * 3 + 1, rstd)
    tl.store(p_stats + token * 3 + 2, norm_rstd)
    tl.store(p_x + o_row, b_x.to(p_x.dtype.element_ty), mask=m_d)


@triton.jit(do_not_specialize=["num_tokens"])
def merge_backward(
    p_sum, p_out, p_lse, p_query, p_key_norm, p_weight, p_stats, p_dx, p_later, p_dsum, p_dout, p_dlse, p_partial,
    num_tokens, scale,
    D: tl.constexpr, BLOCK: tl.constexpr, NORM: tl.constexpr, AFFINE: tl.constexpr, CHAINED: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """p_partial: [programs, 1 + AFFINE, D], this program's sums of dq and of the norm weight's gradient."""
    o_d = tl.arange(0, BLOCK)
    m_d = o_d < D
    b_dq = tl.zeros([BLOCK], tl.float32)
    b_dweight = tl.zeros([BLOCK], tl.float32)
    b_q = load_query(p_query, p_key_norm, o_d, m_d)

    # two stages: the next token's rows are copied to shared memory meanwhile
    for token in tl.range(tl.program_id(0).to(tl.int64), num_tokens, tl.num_programs(0), num_stages=STAGES):
        o_row = token * D + o_d
        z = tl.load(p_stats + token * 3)
        rstd = tl.load(p_stats + token * 3 + 1)
        lse = tl.load(p_lse + token)
        share = tl.sigmoid(z - lse)
        rest = tl.sigmoid(lse - z)
        b_s = tl.load(p_sum + o_row, mask=m_d, other=0.0).to(tl.float32)
        b_o = tl.load(p_out + o_row, mask=m_d, other=0.0).to(tl.float32)
        b_dh = tl.load(p_dx + o_row, mask=m_d, other=0.0).to(tl.float32)
        if NORM:
            norm_rstd = tl.load(p_stats + token * 3 + 2)
            b_normed = (scale * norm_rstd * rest) * b_o + (scale * norm_rstd * share) * b_s
            if AFFINE:
                b_dweight += b_dh * b_normed
                b_dh = b_dh * tl.load(p_weight + o_d, mask=m_d, other=0.0).to(tl.float32)
            along, gap, lean = sums((b_dh * b_normed, b_dh * (b_s - b_o), b_normed * (b_s - b_o)), 3)
            b_dh = (scale * norm_rstd) * (b_dh - b_normed * (along / D))
            gap = (scale * norm_rstd) * (gap - lean * (along / D))
        else:
            b_dh = b_dh * scale
            gap = tl.sum(b_dh * (b_s - b_o), 0)
        dz = share * rest * gap
        along_query = dz * rstd
        b_dq += along_query * b_s
        tl.store(p_dlse + token, -dz)
        tl.store(p_dout + o_row, (rest * b_dh).to(p_dout.dtype.element_ty), mask=m_d)
        b_ds = share * b_dh + along_query * b_q
        b_ds -= (dz * z * rstd * rstd / D) * b_s
        if CHAINED:
            b_ds += tl.load(p_later + o_row, mask=m_d, other=0.0).to(tl.float32)
        tl.store(p_dsum + o_row, b_ds.to(p_dsum.dtype.element_ty), mask=m_d)

    p_row = p_partial + tl.program_id(0) * (1 + AFFINE) * D + o_d
    tl.store(p_row, b_dq, mask=m_d)
    if AFFINE:
        tl.store(p_row + D, b_dweight, mask=m_d)


def merge(
    query: Tensor, key_norm: Tensor, partial: Tensor | None, update: Tensor, out: Tensor, lse: Tensor,
    weight: Tensor | None, eps: float, norm_eps: float | None, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(partial + update, x [..., D], what backward needs [..., 3]). partial None: the sum is `update`, and comes back
    empty. norm_eps None: no norm follows."""
    partial_sum, x, stats = _merge_outputs(partial, update)
    width, num_tokens = x.shape[-1], lse.numel()
    if num_tokens == 0:
        return partial_sum, x, stats
    config = row_config("merge_forward", x, num_tokens)
    launch(
        merge_forward, (num_tokens,),
        dense_or_none(partial), dense(update), dense(out), dense(lse), dense(query), dense(key_norm),
        dense_or_none(weight), partial_sum, x, stats, scale, eps, norm_eps or 0.0,
        D=width, BLOCK=config.BLOCK, ADD=partial is not None, NORM=norm_eps is not None, AFFINE=weight is not None,
        num_warps=config.num_warps, device=x.device,
    )  # fmt: skip
    return partial_sum, x, stats


merge_op = torch.library.custom_op("attnres::merge", merge, mutates_args=())


@merge_op.register_fake
def _(query, key_norm, partial, update, out, lse, weight, eps, norm_eps, scale):  # type: ignore[no-untyped-def]
    return _merge_outputs(partial, update)


def _merge_outputs(partial: Tensor | None, update: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    stats = update.new_empty((*update.shape[:-1], 3), dtype=torch.float32)
    return update.new_empty(0 if partial is None else update.shape), update.new_empty(update.shape), stats


def merge_gradients(
    query: Tensor, key_norm: Tensor, partial_sum: Tensor, out: Tensor, lse: Tensor, weight: Tensor | None,
    stats: Tensor, dx: Tensor, later: Tensor | None, norm_eps: float | None, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(dquery, dkey_norm, dpartial = dupdate, dout, dlse, dweight or empty). later: what is added to dpartial."""
    query, key_norm, weight = dense(query), dense(key_norm), dense_or_none(weight)
    width, num_tokens = dx.shape[-1], lse.numel()
    dpartial, dout = dx.new_empty(dx.shape), dx.new_empty(dx.shape)
    dlse = lse.new_empty(lse.shape)
    config = row_config("merge_backward", dx, num_tokens)
    partial = dx.new_empty((config.programs, 1 + (weight is not None), width), dtype=torch.float32)
    if num_tokens == 0:
        partial.zero_()
    else:
        launch(
            merge_backward, (config.programs,),
            dense(partial_sum), dense(out), dense(lse), query, key_norm, weight, stats, dense(dx), dense_or_none(later),
            dpartial, dout, dlse, partial, num_tokens, scale,
            D=width, BLOCK=config.BLOCK, NORM=norm_eps is not None, AFFINE=weight is not None,
            CHAINED=later is not None, STAGES=config.STAGES, num_warps=config.num_warps, device=dx.device,
        )  # fmt: skip
    dquery, dkey_norm, dweight = sum_partials(partial, query, key_norm, weight)
    return dquery, dkey_norm, dpartial, dout, dlse, dweight


merge_gradients_op = torch.library.custom_op("attnres::merge_backward", merge_gradients, mutates_args=())


@merge_gradients_op.register_fake
def _(query, key_norm, partial_sum, out, lse, weight, stats, dx, later, norm_eps, scale):  # type: ignore[no-untyped-def]
    return (
        query.new_empty(query.shape),
        key_norm.new_empty(key_norm.shape),
        dx.new_empty(dx.shape),
        dx.new_empty(dx.shape),
        lse.new_empty(lse.shape),
        stats.new_empty(0) if weight is None else weight.new_empty(weight.shape),
    )


class Merge(torch.autograd.Function):
    """The partial sum and x. partial None: the sum is `update` itself, handed on."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key_norm: Tensor,
        partial: Tensor | None,
        update: Tensor,
        out: Tensor,
        lse: Tensor,
        weight: Tensor | None,
        eps: float,
        norm_eps: float | None,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        total, x, stats = called(merge, merge_op)(
            query, key_norm, partial, update, out, lse, weight, eps, norm_eps, scale
        )
        ctx.norm_eps, ctx.scale, ctx.added = norm_eps, scale, partial is not None
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(query, key_norm, total if ctx.added else update, out, lse, weight, stats)
        return total if ctx.added else handed_on([update])[0], x

    @staticmethod
    def backward(ctx: Any, later: Tensor | None, dx: Tensor | None) -> tuple[Any, ...]:  # type: ignore[override]
        query, key_norm, total, out, lse, weight, stats = ctx.saved_tensors
        (dx,) = or_zeros([dx], total)
        dquery, dkey_norm, dtotal, dout, dlse, dweight = called(merge_gradients, merge_gradients_op)(
            query, key_norm, total, out, lse, weight, stats, dx, later, ctx.norm_eps, ctx.scale
        )
        dpartial = dtotal if ctx.added else None
        return dquery, dkey_norm, dpartial, dtotal, dout, dlse, None if weight is None else dweight, None, None, None
