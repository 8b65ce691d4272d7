"""Depth attention with its gradient written by hand: the fast form without a compiler, for CPUs above all.

With u = w * g, r_i = rsqrt(mean(v_i^2) + eps), z_i = <u, v_i>, p = softmax(z * r) and h = s * sum_i p_i v_i:

    ds_i = p_i (s <dh, v_i> - sum_j p_j s <dh, v_j>)           gradient of the logit
    dv_i = s p_i dh + ds_i r_i u - (ds_i z_i r_i^3 / D) v_i
    du   = sum_i sum_tokens ds_i r_i v_i

Autograd over the reference writes a dozen [T, D] temporaries per source; this writes one, its gradient. Everything is
computed in the statistics dtype (fp32, or fp64 for fp64 inputs); only per-token scalars and the sources are saved.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import reference
from .reference import (
    Norm,
    add_norm,
    distinct,
    fold,
    inter_block,
    inter_block_chained,
    merge,
    merge_norm,
    rms_norm,
    scaled_before,
)

__all__ = [
    "add_norm",
    "depth_attention",
    "inter_block",
    "inter_block_chained",
    "merge",
    "merge_norm",
    "read_norm",
    "read_norm_chained",
    "rms_norm",
]


def _read(folded: Tensor, eps: float, scale: float, sources: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(h in the dtype of the sources, and per source and token: <u, v>, reciprocal RMS, softmax weight)."""
    dim, dtype = folded.shape[0], folded.dtype
    with torch.autocast(folded.device.type, enabled=False):
        values = [source.to(dtype) for source in sources]
        dots = torch.stack([v @ folded for v in values])
        norms = torch.stack([torch.linalg.vector_norm(v, dim=-1) for v in values])
        rstds = torch.rsqrt(norms.square_() / dim + eps)
        weights = (dots * rstds).softmax(0)
        scaled = (weights * scale).unsqueeze(-1)
        h = values[0] * scaled[0]
        # compiled by torch 2.11, a Function's gradients are wrong where it returns what an operation in place or a cast
        # to the same dtype has handed back
        add = torch.addcmul if torch.compiler.is_compiling() else Tensor.addcmul_
        for v, p in zip(values[1:], scaled[1:], strict=True):
            h = add(h, v, p)
    return h if h.dtype == sources[0].dtype else h.to(sources[0].dtype), dots, rstds, weights


class _DepthAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, folded: Tensor, eps: float, scale: float, *sources: Tensor) -> tuple[Tensor, Tensor]:
        h, dots, rstds, weights = _read(folded, eps, scale, sources)
        ctx.scale = scale
        ctx.save_for_backward(folded, dots, rstds, weights, *sources)
        ctx.mark_non_differentiable(weights)
        return h, weights

    @staticmethod
    def backward(ctx: Any, dh: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        folded, dots, rstds, weights, *sources = ctx.saved_tensors
        dim, dtype = folded.shape[0], folded.dtype
        with torch.autocast(folded.device.type, enabled=False):
            dh = dh.to(dtype)
            values = [source.to(dtype) for source in sources]
            da = torch.stack([torch.linalg.vecdot(v, dh) for v in values]) * ctx.scale
            dlogits = weights * (da - (weights * da).sum(0))
            along_query = dlogits * rstds
            along_value = (along_query * dots * rstds.square() / -dim).unsqueeze(-1)
            scaled = (weights * ctx.scale).unsqueeze(-1)
            dfolded = torch.zeros_like(folded).unsqueeze(0)
            dsources = []
            for i, v in enumerate(values):
                rows = v.reshape(-1, dim)
                # torch.compile leaves [1, tokens] @ rows to BLAS and writes a loop for [tokens] @ rows, casts included
                shape = (1, -1) if sources[i].dtype == dtype else (-1,)
                dfolded += along_query[i].reshape(shape) @ rows
                dv = (dh * scaled[i]).addcmul_(v, along_value[i]).reshape(-1, dim)
                dv.addr_(along_query[i].reshape(-1), folded)
                dsources.append(dv.view_as(v).to(sources[i].dtype))
        return dfolded[0], None, None, *dsources


def depth_attention(
    query: Tensor,
    sources: Sequence[Tensor],
    key_norm: Tensor | None,
    eps: float = 1e-6,
    return_weights: bool = False,
    *,
    scale: float = 1.0,
) -> Tensor | tuple[Tensor, Tensor]:
    folded = fold(query, key_norm, sources[0].dtype)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (folded, *sources)):
        h, weights = _DepthAttention.apply(*distinct(folded, eps, scale, *sources))
    else:  # torch.compile cannot trace a Function whose inputs need no gradient
        h, _, _, weights = _read(folded, eps, scale, sources)
    return (h, weights) if return_weights else h


def read_norm(
    query: Tensor, sources: Sequence[Tensor], key_norm: Tensor | None, eps: float, *, scale: float, norm: Norm | None
) -> Tensor:
    scale, norm = scaled_before(norm, scale)
    return rms_norm(depth_attention(query, sources, key_norm, eps, scale=scale), norm)  # type: ignore[arg-type]


def read_norm_chained(
    query: Tensor,
    sources: Sequence[Tensor],
    key_norm: Tensor | None,
    eps: float,
    *,
    scale: float,
    norm: Norm | None,
    prior: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, list[Tensor]]:
    if prior is not None:
        return reference.read_norm_chained(query, sources, key_norm, eps, scale=scale, norm=norm, prior=prior)
    return read_norm(query, sources, key_norm, eps, scale=scale, norm=norm), list(sources)
