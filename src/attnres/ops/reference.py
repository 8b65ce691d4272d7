"""Depth attention in plain PyTorch: the truth that every faster backend is tested against.

    logit_i = <w * g, v_i> * rsqrt(mean(v_i^2) + eps)        (equal to w . RMSNorm_g(v_i), without building the key)
    h       = scale * sum_i softmax_i(logit) v_i

Runs on any device and dtype. Statistics and softmax are fp32, or fp64 for fp64 inputs. Sources are never stacked and
normalised keys are never materialised. Autograd differentiates through everything. Paper: sections 2 and 4 (Full
AttnRes and the two-phase computation), arXiv 2603.15031.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Norm = tuple[Tensor | None, float]
"""The RMSNorm that follows a read: (weight [D] or None, eps)."""


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


def logits(query: Tensor, sources: Sequence[Tensor], key_norm: Tensor | None, eps: float) -> Tensor:
    """Attention logits over depth: query, key_norm [D], sources n x [..., D] -> [n, ...]."""
    folded = fold(query, key_norm, sources[0].dtype)
    rows = []
    for source in sources:
        v = source.to(folded.dtype)
        rows.append((v * folded).sum(-1) * torch.rsqrt(v.square().mean(-1) + eps))
    return torch.stack(rows)


def mix(weights: Tensor, sources: Sequence[Tensor]) -> Tensor:
    """sum_i weights[i] * sources[i], summed in the statistics dtype and returned in the dtype of the sources."""
    total = weights[0].unsqueeze(-1) * sources[0].to(weights.dtype)
    for weight, source in zip(weights[1:], sources[1:], strict=True):
        total = total + weight.unsqueeze(-1) * source.to(weights.dtype)
    return total.to(sources[0].dtype)


def depth_attention(
    query: Tensor,
    sources: Sequence[Tensor],
    key_norm: Tensor | None,
    eps: float = 1e-6,
    return_weights: bool = False,
    *,
    scale: float = 1.0,
) -> Tensor | tuple[Tensor, Tensor]:
    weights = logits(query, sources, key_norm, eps).softmax(0)
    h = mix(weights * scale, sources)
    return (h, weights) if return_weights else h


def inter_block(
    queries: Tensor, sources: Sequence[Tensor], key_norms: Tensor | None, eps: float = 1e-6
) -> tuple[list[Tensor], list[Tensor]]:
    outs, lses = [], []
    for query in fold(queries, key_norms, sources[0].dtype):
        scores = logits(query, sources, None, eps)
        lses.append(scores.logsumexp(0))
        outs.append(mix(scores.softmax(0), sources))
    return outs, lses


def merge(
    query: Tensor,
    partial: Tensor,
    key_norm: Tensor | None,
    out: Tensor,
    lse: Tensor,
    eps: float = 1e-6,
    *,
    scale: float = 1.0,
) -> Tensor:
    weight = torch.sigmoid(logits(query, [partial], key_norm, eps)[0] - lse)
    return mix(torch.stack([1 - weight, weight]) * scale, [out, partial])


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


def scaled_before(norm: Norm | None, scale: float) -> tuple[float, Norm | None]:
    """(factor, norm) that give the norm of scale * h as the norm of factor * h.

    In front of a norm the factor is 1: scale * h, which may be beyond the range of fp16, is never made.
    """
    return (scale, None) if norm is None else (1.0, scaled_norm(norm, scale))


def read_norm(
    query: Tensor, sources: Sequence[Tensor], key_norm: Tensor | None, eps: float, *, scale: float, norm: Norm | None
) -> Tensor:
    scale, norm = scaled_before(norm, scale)
    return rms_norm(depth_attention(query, sources, key_norm, eps, scale=scale), norm)  # type: ignore[arg-type]


def merge_norm(
    query: Tensor,
    partial: Tensor | None,
    update: Tensor,
    key_norm: Tensor | None,
    out: Tensor,
    lse: Tensor,
    eps: float,
    *,
    scale: float,
    norm: Norm | None,
) -> tuple[Tensor, Tensor]:
    partial = update if partial is None else partial + update
    scale, norm = scaled_before(norm, scale)
    return partial, rms_norm(merge(query, partial, key_norm, out, lse, eps, scale=scale), norm)


def add_norm(stream: Tensor, update: Tensor, *, norm: Norm | None) -> tuple[Tensor, Tensor]:
    stream = stream + update
    return stream, rms_norm(stream, norm)


def distinct(*inputs: Any) -> tuple[Any, ...]:
    """Inputs of an autograd.Function; views of the tensors for torch.compile if one occurs twice, which it refuses, or
    before torch 2.13 loses a part of its gradient for."""
    if not torch.compiler.is_compiling():
        return inputs
    tensors = [value for value in inputs if isinstance(value, Tensor)]
    if len({*tensors}) == len(tensors):
        return inputs
    return tuple(value.view_as(value) if isinstance(value, Tensor) else value for value in inputs)


def join_reads(earlier: tuple[Tensor, Tensor], later: tuple[Tensor, Tensor], scale: float) -> Tensor:
    """scale times the read over two sets of sources, from (read [..., D], log-sum-exp [...]) over each of them."""
    gap = later[1] - earlier[1]
    return mix(torch.stack([torch.sigmoid(-gap), torch.sigmoid(gap)]) * scale, [earlier[0], later[0]])


def inter_block_chained(
    queries: Tensor,
    sources: Sequence[Tensor],
    key_norms: Tensor | None,
    eps: float,
    *,
    scale: float = 1.0,
    norm: Norm | None = None,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    outs, lses = inter_block(queries, sources, key_norms, eps)
    if norm is not None:
        outs[0] = rms_norm(outs[0], scaled_norm(norm, scale))
    return outs, lses, list(sources)


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
    if prior is None:
        return read_norm(query, sources, key_norm, eps, scale=scale, norm=norm), list(sources)
    key_norms = None if key_norm is None else key_norm.unsqueeze(0)
    (out,), (lse,) = inter_block(query.unsqueeze(0), sources, key_norms, eps)
    scale, norm = scaled_before(norm, scale)
    return rms_norm(join_reads(prior, (out, lse), scale), norm), list(sources)


def scaled_norm(norm: Norm, scale: float) -> Norm:
    """The norm of h that is the given norm of scale * h: it takes the scale away again, but for its eps."""
    return norm[0], norm[1] / scale**2
