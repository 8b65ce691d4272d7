"""The formulas of depth attention in plain PyTorch, for any device and dtype, differentiable by autograd.

    logit_i = <w * g, v_i> * rsqrt(mean(v_i^2) + eps)        (equal to w . RMSNorm_g(v_i), without building the key)
    h       = scale * sum_i softmax_i(logit) v_i

Statistics and softmax are fp32, or fp64 for fp64 inputs. Sources are never stacked and normalised keys are never
materialised.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

Norm = tuple[Tensor | None, float]
"""The RMSNorm that follows a read: (weight [D] or None, eps)."""

Prior = tuple[Tensor, Tensor]
"""A read that another goes on from: (its result [..., D], the log-sum-exp of its logits [...])."""


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which logits, softmax and sums over depth are computed for tensors of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def fold(query: Tensor, key_norm: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The product of queries and key norms, [D] or [S, D], in the statistics dtype for sources of `dtype`.

    Ops take it as queries with None for key norms: whoever reads without gradients needs it but once a block. None here
    means the same.
    """
    folded = query.to(statistics_dtype(dtype))
    return folded if key_norm is None else folded * key_norm.to(folded.dtype)


def keys(query: Tensor, sources: Sequence[Tensor]) -> Sequence[Tensor]:
    """What of the sources a read's query meets: all for [D], [..., H, D / H] for [H, D / H], the last r channels for
    [r]."""
    if query.dim() > 1:
        return [source.unflatten(-1, query.shape) for source in sources]
    return sources if query.shape == sources[0].shape[-1:] else [source[..., -len(query) :] for source in sources]


def logits(query: Tensor, sources: Sequence[Tensor], key_norm: Tensor | None, eps: float) -> Tensor:
    """Attention logits over depth: query, key_norm [D], sources n x [..., D] -> [n, ...]."""
    folded = fold(query, key_norm, sources[0].dtype)
    rows = []
    for source in sources:
        v = source.to(folded.dtype)
        rows.append((v * folded).sum(-1) * torch.rsqrt(v.square().mean(-1) + eps))
    return torch.stack(rows)


def mix(weights: Tensor, sources: Sequence[Tensor]) -> Tensor:
    """sum_i weights[i] * sources[i], summed in the statistics dtype and returned in the dtype of the sources.

    weights: [n], [n, ...], or [n, ..., H] for slices of the width."""
    if weights.dim() > sources[0].dim():
        slices = [source.unflatten(-1, (weights.shape[-1], -1)) for source in sources]
        return mix(weights, slices).flatten(-2)
    total = weights[0].unsqueeze(-1) * sources[0].to(weights.dtype)
    for weight, source in zip(weights[1:], sources[1:], strict=True):
        total = total + weight.unsqueeze(-1) * source.to(weights.dtype)
    return total.to(sources[0].dtype)


def rms_norm(h: Tensor, norm: Norm | None) -> Tensor:
    """RMSNorm over the last dimension with the pair (weight, eps); None leaves h as it is. Rounded once, at the end."""
    if norm is None:
        return h
    weight, eps = norm
    shape = h.shape[-1:]
    if weight is None or weight.dtype == h.dtype:
        return torch.nn.functional.rms_norm(h, shape, weight, eps)
    wide = statistics_dtype(h.dtype)
    return torch.nn.functional.rms_norm(h.to(wide), shape, weight.to(wide), eps).to(h.dtype)


def scaled_norm(norm: Norm, scale: float) -> Norm:
    """The norm of h that is the given norm of scale * h: it takes the scale away again, but for its eps.

    The product, which may be beyond the range of fp16, is then never made.
    """
    return norm[0], norm[1] / scale**2


def merge(
    query: Tensor, partial: Tensor, key_norm: Tensor | None, out: Tensor, lse: Tensor, eps: float, scale: float
) -> Tensor:
    """scale times the read over `partial` and the sources of phase 1's (out, lse), [..., D]."""
    weight = torch.sigmoid(logits(query, [partial], key_norm, eps)[0] - lse)
    return mix(torch.stack([1 - weight, weight]) * scale, [out, partial])


def join_reads(earlier: Prior, later: Prior, scale: float) -> Tensor:
    """scale times the read over two sets of sources, from the read over each of them."""
    gap = later[1] - earlier[1]
    return mix(torch.stack([torch.sigmoid(-gap), torch.sigmoid(gap)]) * scale, [earlier[0], later[0]])
