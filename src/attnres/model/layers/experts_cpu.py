"""Experts one after the other, from the tokens and back to them, with a gradient written by hand: the form for CPUs.

    h_r = a(G_e x_n) * c(U_e x_n),     y_n = sum over the rows r of token n of w_r D_e h_r         e = e(r), n = n(r)

    dh_r = D_e^T dy_n,   dw_r = dh_r . h_r,   dD_e = sum over the rows of e of dy_n (w_r h_r)^T,   and so on through h

One expert's rows stay in the caches; those of all, [R, D], would not, and are never made. Nor do the weights of all
experts pass through memory more often than they must: every gradient is written to its place once. A custom op, so that
a compiler does not look at the loop, whose lengths are data. Shape suffixes as in `moe`; G, U, D of an expert are
gate_EID[e], up_EID[e], down_EDI[e]; a and c are the activation's.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ...version import NAMESPACE
from .activation import SILU, Activation


def token_experts(
    x_ND: Tensor,
    weight_R: Tensor,
    token_R: Tensor,
    count_E: Tensor,
    gate_EID: Tensor,
    up_EID: Tensor,
    down_EDI: Tensor,
    activation: Activation = SILU,
) -> Tensor:
    """Outputs [N, D] for tokens [N, D], in their dtype: the sums of each token's rows.

    Rows are sorted by expert. weight_R: what a row's output is multiplied by, fp32 or wider; token_R: the token that it
    is of; count_E: rows of every expert; they go to the host. The matrices are cast to the dtype of the tokens, one
    expert at a time, and half precision is added up in fp32. Differentiable once.
    """
    return _experts(x_ND, weight_R, token_R, count_E, gate_EID, up_EID, down_EDI, *activation)[0]


@torch.library.custom_op(f"{NAMESPACE}::token_experts", mutates_args=())
def _experts(
    x_ND: Tensor,
    weight_R: Tensor,
    token_R: Tensor,
    count_E: Tensor,
    gate_EID: Tensor,
    up_EID: Tensor,
    down_EDI: Tensor,
    beta: float,
    linear_beta: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The outputs, and gate and up [R, I] of all rows, which the backward pass starts from."""
    activation = Activation(beta, linear_beta)
    gate_RI, up_RI = (x_ND.new_empty(len(token_R), gate_EID.shape[1]) for _ in range(2))
    y_ND = torch.zeros_like(x_ND, dtype=_wide(x_ND))
    with torch.autocast(x_ND.device.type, enabled=False):
        for e, rows in _experts_with_rows(count_E):
            gate_ID, up_ID, down_DI = (matrix[e].to(x_ND.dtype) for matrix in (gate_EID, up_EID, down_EDI))
            x_rD = x_ND.index_select(0, token_R[rows])
            gate_rI, up_rI = gate_RI[rows], up_RI[rows]
            torch.mm(x_rD, gate_ID.t(), out=gate_rI)
            torch.mm(x_rD, up_ID.t(), out=up_rI)
            h_rI = activation.of_gate(gate_rI).mul_(activation.of_up(up_rI)).mul_(weight_R[rows, None])
            y_ND.index_add_(0, token_R[rows], torch.mm(h_rI, down_DI.t()).to(y_ND.dtype))
    return y_ND.to(x_ND.dtype), gate_RI, up_RI


@torch.library.custom_op(f"{NAMESPACE}::token_experts_backward", mutates_args=())
def _backward(
    dy_ND: Tensor,
    x_ND: Tensor,
    weight_R: Tensor,
    token_R: Tensor,
    count_E: Tensor,
    gate_EID: Tensor,
    up_EID: Tensor,
    down_EDI: Tensor,
    gate_RI: Tensor,
    up_RI: Tensor,
    beta: float,
    linear_beta: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of tokens, weights and the three matrices."""
    activation = Activation(beta, linear_beta)
    dx_ND = torch.zeros_like(x_ND, dtype=_wide(x_ND))
    dweight_R = torch.empty_like(weight_R)
    dgate_EID, dup_EID, ddown_EDI = (torch.empty_like(matrix) for matrix in (gate_EID, up_EID, down_EDI))
    with torch.autocast(x_ND.device.type, enabled=False):
        for e, rows in _experts_with_rows(count_E):
            gate_ID, up_ID, down_DI = (matrix[e].to(x_ND.dtype) for matrix in (gate_EID, up_EID, down_EDI))
            x_rD, dy_rD = (tokens.index_select(0, token_R[rows]) for tokens in (x_ND, dy_ND))
            gate_rI, up_rI, weight_r1 = gate_RI[rows], up_RI[rows], weight_R[rows, None]
            a_rI, c_rI = activation.of_gate(gate_rI), activation.of_up(up_rI)
            h_rI = a_rI * c_rI
            dh_rI = dy_rD @ down_DI
            torch.sum(dh_rI * h_rI, 1, dtype=weight_R.dtype, out=dweight_R[rows])
            dh_rI.mul_(weight_r1)
            _product(dy_rD.t(), h_rI.mul_(weight_r1), ddown_EDI[e])
            dgate_rI = activation.gate_gradient(dh_rI * c_rI, gate_rI)
            dup_rI = activation.up_gradient(dh_rI.mul_(a_rI), up_rI)
            _product(dgate_rI.t(), x_rD, dgate_EID[e])
            _product(dup_rI.t(), x_rD, dup_EID[e])
            dx_rD = torch.mm(dgate_rI, gate_ID).addmm_(dup_rI, up_ID)
            dx_ND.index_add_(0, token_R[rows], dx_rD.to(dx_ND.dtype))
    for e in (count_E == 0).nonzero().flatten().tolist():
        for gradient in (dgate_EID, dup_EID, ddown_EDI):
            gradient[e].zero_()
    return dx_ND.to(x_ND.dtype), dweight_R, dgate_EID, dup_EID, ddown_EDI


def _experts_with_rows(count_E: Tensor) -> Iterator[tuple[int, slice]]:
    end = 0
    for e, count in enumerate(count_E.tolist()):
        begin, end = end, end + count
        if count:
            yield e, slice(begin, end)


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """a @ b in place of `out`, which may be wider."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    else:
        out.copy_(a @ b)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


@_experts.register_fake
def _(x_ND: Tensor, weight_R: Tensor, token_R: Tensor, count_E: Tensor, gate_EID: Tensor, *_: Any) -> Any:
    rows = (x_ND.new_empty(token_R.shape[0], gate_EID.shape[1]) for _ in range(2))  # len would make a symbol a number
    return torch.empty_like(x_ND), *rows


@_backward.register_fake
def _(
    dy_ND: Tensor, x_ND: Tensor, weight_R: Tensor, token_R: Tensor, count_E: Tensor, *others: Any
) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(given) for given in (x_ND, weight_R, *others[:3]))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.activation = inputs[7:]
    ctx.save_for_backward(*inputs[:7], *output[1:])


def _differentiate(ctx: Any, dy_ND: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    dx, dweight, *matrices = _backward(dy_ND.contiguous(), *ctx.saved_tensors, *ctx.activation)
    return dx, dweight, None, None, *matrices, None, None


_experts.register_autograd(_differentiate, setup_context=_setup)
