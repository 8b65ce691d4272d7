"""Triton kernels of the standard residual's step: stream + update and its RMSNorm in one pass.

    s = stream + update, rounded to the storage dtype;   x = s r w  with  r = rsqrt(mean(s^2) + eps)

Without a stream it is the RMSNorm alone, and s is update. Forward reads two rows a token and writes two (one and one
without a stream). Backward, with gx = dx w and x^ = s r, reads three (two) and writes one:

    ds = ds' + r (gx - x^ mean(gx x^))         ds' from the stream's later readers; the gradient of stream and update
    dw = sum_tokens dx x^                      one partial row a program, summed by `reduce`
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .chain import called, handed_on, or_zeros
from .launch import dense, dense_or_none, launch, row_config
from .reduce import sum_partials


@triton.jit
def add_norm_forward(
    p_stream, p_update, p_weight, p_sum, p_x, p_rstd, eps,
    D: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr, AFFINE: tl.constexpr,
):  # fmt: skip
    """ADD false: s is `p_update` itself and p_sum is not written."""
    token = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BLOCK)
    m_d = o_d < D
    o_row = token * D + o_d

    b_s = tl.load(p_update + o_row, mask=m_d, other=0.0).to(tl.float32)
    if ADD:
        b_s += tl.load(p_stream + o_row, mask=m_d, other=0.0).to(tl.float32)
        b_sum = b_s.to(p_sum.dtype.element_ty)
        tl.store(p_sum + o_row, b_sum, mask=m_d)
        b_s = b_sum.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(b_s * b_s, 0) / D + eps)
    b_x = b_s * rstd
    if AFFINE:
        b_x = b_x * tl.load(p_weight + o_d, mask=m_d, other=0.0).to(tl.float32)
    tl.store(p_x + o_row, b_x.to(p_x.dtype.element_ty), mask=m_d)
    tl.store(p_rstd + token, rstd)


@triton.jit(do_not_specialize=["num_tokens"])
def add_norm_backward(
    p_sum, p_weight, p_rstd, p_dx, p_later, p_dsum, p_partial, num_tokens,
    D: tl.constexpr, BLOCK: tl.constexpr, AFFINE: tl.constexpr, CHAINED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """p_partial: [programs, 1, D], this program's sum of the weight's gradient."""
    o_d = tl.arange(0, BLOCK)
    m_d = o_d < D
    b_dweight = tl.zeros([BLOCK], tl.float32)

    for token in tl.range(tl.program_id(0).to(tl.int64), num_tokens, tl.num_programs(0), num_stages=STAGES):
        o_row = token * D + o_d
        rstd = tl.load(p_rstd + token)
        b_normed = tl.load(p_sum + o_row, mask=m_d, other=0.0).to(tl.float32) * rstd
        b_dx = tl.load(p_dx + o_row, mask=m_d, other=0.0).to(tl.float32)
        if AFFINE:
            b_dweight += b_dx * b_normed
            b_dx = b_dx * tl.load(p_weight + o_d, mask=m_d, other=0.0).to(tl.float32)
        b_ds = rstd * (b_dx - b_normed * (tl.sum(b_dx * b_normed, 0) / D))
        if CHAINED:
            b_ds += tl.load(p_later + o_row, mask=m_d, other=0.0).to(tl.float32)
        tl.store(p_dsum + o_row, b_ds.to(p_dsum.dtype.element_ty), mask=m_d)

    if AFFINE:
        tl.store(p_partial + tl.program_id(0) * D + o_d, b_dweight, mask=m_d)


def add_norm(stream: Tensor | None, update: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(stream + update, its RMSNorm, the norm's rstd [...]). stream None: the sum is `update`, and comes back empty."""
    total, x, rstd = _add_norm_outputs(stream, update)
    width, num_tokens = x.shape[-1], rstd.numel()
    if num_tokens > 0:
        config = row_config("add_norm_forward", x, num_tokens)
        launch(
            add_norm_forward, (num_tokens,),
            dense_or_none(stream), dense(update), dense_or_none(weight), total, x, rstd, eps,
            D=width, BLOCK=config.BLOCK, ADD=stream is not None, AFFINE=weight is not None, num_warps=config.num_warps,
            device=x.device,
        )  # fmt: skip
    return total, x, rstd


add_norm_op = torch.library.custom_op("attnres::add_norm", add_norm, mutates_args=())


@add_norm_op.register_fake
def _(stream, update, weight, eps):  # type: ignore[no-untyped-def]
    return _add_norm_outputs(stream, update)


def _add_norm_outputs(stream: Tensor | None, update: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rstd = update.new_empty(update.shape[:-1], dtype=torch.float32)
    return update.new_empty(0 if stream is None else update.shape), update.new_empty(update.shape), rstd


def add_norm_gradients(
    total: Tensor, weight: Tensor | None, rstd: Tensor, dx: Tensor, later: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(dstream = dupdate, dweight or empty). later: what is added to dstream."""
    width, num_tokens = dx.shape[-1], rstd.numel()
    weight = dense_or_none(weight)
    dtotal = dx.new_empty(dx.shape)
    config = row_config("add_norm_backward", dx, num_tokens)
    partial = dx.new_empty((config.programs, 1, width), dtype=torch.float32)
    if num_tokens == 0:
        partial.zero_()
    else:
        launch(
            add_norm_backward, (config.programs,),
            dense(total), weight, rstd, dense(dx), dense_or_none(later), dtotal, partial, num_tokens,
            D=width, BLOCK=config.BLOCK, AFFINE=weight is not None, CHAINED=later is not None, STAGES=config.STAGES,
            num_warps=config.num_warps, device=dx.device,
        )  # fmt: skip
    if weight is None:
        return dtotal, rstd.new_empty(0)
    return dtotal, sum_partials(partial, None, None, weight)[2]


add_norm_gradients_op = torch.library.custom_op("attnres::add_norm_backward", add_norm_gradients, mutates_args=())


@add_norm_gradients_op.register_fake
def _(total, weight, rstd, dx, later):  # type: ignore[no-untyped-def]
    return dx.new_empty(dx.shape), rstd.new_empty(0) if weight is None else weight.new_empty(weight.shape)


class AddNorm(torch.autograd.Function):
    """stream + update and its norm. stream None: the sum is `update` itself, handed on."""

    @staticmethod
    def forward(
        ctx: Any, stream: Tensor | None, update: Tensor, weight: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor]:
        total, x, rstd = called(add_norm, add_norm_op)(stream, update, weight, eps)
        ctx.added = stream is not None
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(total if ctx.added else update, weight, rstd)
        return total if ctx.added else handed_on([update])[0], x

    @staticmethod
    def backward(ctx: Any, later: Tensor | None, dx: Tensor | None) -> tuple[Any, ...]:  # type: ignore[override]
        total, weight, rstd = ctx.saved_tensors
        (dx,) = or_zeros([dx], total)
        dtotal, dweight = called(add_norm_gradients, add_norm_gradients_op)(total, weight, rstd, dx, later)
        return dtotal if ctx.added else None, dtotal, None if weight is None else dweight, None
