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

from .autograd import differentiates, distinct
from .formulas import fold
from .reference import Reference


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


class Eager(Reference):
    def read_with_weights(
        self, query: Tensor, sources: Sequence[Tensor], key_norm: Tensor | None, eps: float, scale: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        if query.shape != sources[0].shape[-1:]:
            return super().read_with_weights(query, sources, key_norm, eps, scale)
        folded = fold(query, key_norm, sources[0].dtype)
        if differentiates(folded, *sources):
            h, weights = _DepthAttention.apply(*distinct(folded, eps, scale, *sources))
        else:
            h, _, _, weights = _read(folded, eps, scale, sources)
        return h, weights
