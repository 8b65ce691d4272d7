"""The Triton backend: depth attention on GPUs, with the residual add and the following RMSNorm folded in.

Same functions as `reference`, for bf16, fp16 and fp32 tensors on CUDA devices, up to 8192 wide and 256 sources. Kernels
and custom ops are in the triton_* modules, autograd and the threaded forms in triton_autograd.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .check import check_queries, check_scale, check_sources, check_statistics, check_vectors
from .reference import Norm
from .triton_autograd import FirstMerge, ThreadedInterBlock, ThreadedRead
from .triton_inter_block import inter_block as inter_block_op
from .triton_launch import check_supported
from .triton_merge import merge as merge_op
from .triton_norm import add_norm as add_norm_op
from .triton_read import read as read_op

__all__ = [
    "add_norm",
    "depth_attention",
    "inter_block",
    "inter_block_threaded",
    "merge",
    "merge_norm",
    "read_norm",
    "read_norm_threaded",
    "rms_norm",
]


def depth_attention(
    query: Tensor,
    sources: Sequence[Tensor],
    key_norm: Tensor,
    eps: float = 1e-6,
    return_weights: bool = False,
    *,
    scale: float = 1.0,
) -> Tensor | tuple[Tensor, Tensor]:
    """h [..., D], and with return_weights the softmax weights [n, ...] in fp32, without gradient."""
    _check_read(query, sources, key_norm, eps, scale, None)
    h, lse, logits = read_op(query, key_norm, list(sources), None, eps, None, scale, return_weights)
    if not return_weights:
        return h
    return h, torch.exp(logits - lse.unsqueeze(-1)).movedim(-1, 0)


def inter_block(
    queries: Tensor, sources: Sequence[Tensor], key_norms: Tensor, eps: float = 1e-6
) -> tuple[list[Tensor], list[Tensor]]:
    """S reads [..., D] and their log-sum-exps [...] in fp32, in one pass over the sources."""
    _check_inter_block(queries, sources, key_norms, eps)
    outs, lse, _, _ = inter_block_op(queries, key_norms, list(sources), eps, True)
    return outs, list(lse.unbind(0))


def merge(
    query: Tensor,
    partial: Tensor,
    key_norm: Tensor,
    out: Tensor,
    lse: Tensor,
    eps: float = 1e-6,
    *,
    scale: float = 1.0,
) -> Tensor:
    """h [..., D], the read over phase 1's sources and `partial`."""
    _check_merge(query, None, partial, key_norm, out, lse, eps, scale, None)
    return merge_op(query, key_norm, None, partial, out, lse, None, eps, None, scale)[1]


def read_norm(
    query: Tensor, sources: Sequence[Tensor], key_norm: Tensor, eps: float, *, scale: float = 1.0, norm: Norm | None
) -> Tensor:
    """`depth_attention` and the RMSNorm that follows, one launch."""
    _check_read(query, sources, key_norm, eps, scale, norm)
    weight, norm_eps = norm or (None, None)
    return read_op(query, key_norm, list(sources), weight, eps, norm_eps, scale, False)[0]


def merge_norm(
    query: Tensor,
    partial: Tensor | None,
    update: Tensor,
    key_norm: Tensor | None,
    out: Tensor,
    lse: Tensor,
    eps: float,
    *,
    scale: float = 1.0,
    norm: Norm | None,
) -> tuple[Tensor, Tensor]:
    """(partial + update, x): the pending add, the merge and the RMSNorm that follows, one launch."""
    key_norm = torch.ones_like(query) if key_norm is None else key_norm
    _check_merge(query, partial, update, key_norm, out, lse, eps, scale, norm)
    weight, norm_eps = norm or (None, None)
    if partial is None and not torch.is_grad_enabled():
        return update, merge_op(query, key_norm, None, update, out, lse, weight, eps, norm_eps, scale)[1]
    if partial is None:
        return FirstMerge.apply(query, key_norm, update, out, lse, weight, eps, norm_eps, scale)
    return merge_op(query, key_norm, partial, update, out, lse, weight, eps, norm_eps, scale)[:2]


def add_norm(stream: Tensor, update: Tensor, *, norm: Norm | None) -> tuple[Tensor, Tensor]:
    """(stream + update, its RMSNorm), one launch."""
    check_sources([stream, update], "(stream, update)")
    check_supported(stream)
    if norm is None:
        total = stream + update
        return total, total
    weight, eps = norm
    _check_weight(weight, stream)
    total, x, _ = add_norm_op(stream, update, weight, eps)
    return total, x


def rms_norm(h: Tensor, norm: Norm) -> Tensor:
    """RMSNorm of h, one launch."""
    check_sources([h], "(h,)")
    check_supported(h)
    weight, eps = norm
    _check_weight(weight, h)
    return add_norm_op(None, h, weight, eps)[1]


def inter_block_threaded(
    queries: Tensor, sources: Sequence[Tensor], key_norms: Tensor | None, eps: float
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """`inter_block`, and the sources for their next reader. One source is its own read: nothing is written."""
    key_norms = torch.ones_like(queries) if key_norms is None else key_norms
    _check_inter_block(queries, sources, key_norms, eps)
    num_queries = len(queries)
    if not torch.is_grad_enabled():
        outs, lse, _, _ = inter_block_op(queries, key_norms, list(sources), eps, len(sources) > 1)
        return outs or [sources[0]] * num_queries, list(lse.unbind(0)), list(sources)
    results = ThreadedInterBlock.apply(queries, key_norms, eps, *sources)
    return list(results[:num_queries]), list(results[num_queries].unbind(0)), list(results[num_queries + 1 :])


def read_norm_threaded(
    query: Tensor,
    sources: Sequence[Tensor],
    key_norm: Tensor | None,
    eps: float,
    *,
    scale: float = 1.0,
    norm: Norm | None,
) -> tuple[Tensor, list[Tensor]]:
    """`read_norm`, and the sources for their next reader."""
    key_norm = torch.ones_like(query) if key_norm is None else key_norm
    _check_read(query, sources, key_norm, eps, scale, norm)
    weight, norm_eps = norm or (None, None)
    if not torch.is_grad_enabled():
        return read_op(query, key_norm, list(sources), weight, eps, norm_eps, scale, False)[0], list(sources)
    x, *handed_on = ThreadedRead.apply(query, key_norm, weight, eps, norm_eps, scale, *sources)
    return x, handed_on


def _check_read(
    query: Tensor, sources: Sequence[Tensor], key_norm: Tensor, eps: float, scale: float, norm: Norm | None
) -> None:
    check_sources(sources)
    check_vectors(sources[0].shape[-1], sources[0].device, query=query, key_norm=key_norm)
    check_scale(eps, scale)
    check_supported(sources[0], len(sources))
    if norm is not None:
        _check_weight(norm[0], sources[0])


def _check_inter_block(queries: Tensor, sources: Sequence[Tensor], key_norms: Tensor, eps: float) -> None:
    check_sources(sources)
    check_queries(queries, key_norms, sources[0].shape[-1], sources[0].device)
    check_scale(eps)
    check_supported(sources[0], len(sources))


def _check_merge(
    query: Tensor,
    partial: Tensor | None,
    update: Tensor,
    key_norm: Tensor,
    out: Tensor,
    lse: Tensor,
    eps: float,
    scale: float,
    norm: Norm | None,
) -> None:
    check_sources([update, out] if partial is None else [partial, update, out], "(partial, update, out)")
    check_vectors(update.shape[-1], update.device, query=query, key_norm=key_norm)
    check_statistics(lse, out)
    check_scale(eps, scale)
    check_supported(update)
    if norm is not None:
        _check_weight(norm[0], update)


def _check_weight(weight: Tensor | None, source: Tensor) -> None:
    if weight is not None:
        check_vectors(source.shape[-1], source.device, norm_weight=weight)
