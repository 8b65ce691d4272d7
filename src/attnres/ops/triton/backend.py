"""The Triton backend: depth attention on GPUs, with the residual add and the following RMSNorm folded in.

Same functions as `reference`, for bf16, fp16 and fp32 tensors on CUDA devices, up to 8192 wide and 256 sources. Kernels
are in the triton_* modules, autograd and the chaining of gradients in triton_autograd.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..reference import Norm, distinct, scaled_norm
from .autograd import AddNorm, InterBlock, Merge, Read, called
from .inter_block import inter_block as inter_block_now
from .inter_block import inter_block_op, norm_fits
from .launch import check_supported
from .merge import merge as merge_now
from .merge import merge_op
from .norm import add_norm as add_norm_now
from .norm import add_norm_op
from .read import read as read_now
from .read import read_op

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
    h, stats = _read(query, sources, key_norm, eps, scale, None)
    if not return_weights:
        return h
    n = len(sources)
    return h, torch.exp(stats[..., :n] - stats[..., 2 * n : 2 * n + 1]).movedim(-1, 0)


def inter_block(
    queries: Tensor, sources: Sequence[Tensor], key_norms: Tensor, eps: float = 1e-6
) -> tuple[list[Tensor], list[Tensor]]:
    """S reads [..., D] and their log-sum-exps [...] in fp32, in one pass over the sources."""
    return inter_block_chained(queries, sources, key_norms, eps)[:2]


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
    return merge_norm(query, None, partial, key_norm, out, lse, eps, scale=scale, norm=None)[1]


def read_norm(
    query: Tensor, sources: Sequence[Tensor], key_norm: Tensor, eps: float, *, scale: float = 1.0, norm: Norm | None
) -> Tensor:
    """`depth_attention` and the RMSNorm that follows, one launch."""
    return _read(query, sources, key_norm, eps, scale, norm)[0]


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
    check_supported(update)
    weight, norm_eps = norm or (None, None)
    inputs = (query, key_norm, partial, update, out, lse, weight, eps, norm_eps, scale)
    if differentiates(query, key_norm, partial, update, out, lse, weight):
        return Merge.apply(*distinct(*inputs))
    total, x, _ = called(merge_now, merge_op)(*inputs)
    return update if partial is None else total, x


def add_norm(stream: Tensor, update: Tensor, *, norm: Norm | None) -> tuple[Tensor, Tensor]:
    """(stream + update, its RMSNorm), one launch."""
    if norm is None:
        total = stream + update
        return total, total
    return _add_norm(stream, update, norm)


def rms_norm(h: Tensor, norm: Norm | None) -> Tensor:
    """RMSNorm over the last dimension with the pair (weight, eps); None leaves h as it is."""
    return h if norm is None else _add_norm(None, h, norm)[1]


def inter_block_chained(
    queries: Tensor,
    sources: Sequence[Tensor],
    key_norms: Tensor | None,
    eps: float,
    *,
    scale: float = 1.0,
    norm: Norm | None = None,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """`inter_block`, its first read with its scale and the norm that follows, and the sources for their next reader."""
    key_norms = torch.ones_like(queries) if key_norms is None else key_norms
    check_supported(sources[0], len(sources))
    backward = differentiates(queries, key_norms, norm and norm[0], *sources)
    if norm is not None and not norm_fits(sources[0], len(sources), len(queries), backward):
        outs, lses, sources = inter_block_chained(queries, sources, key_norms, eps)
        return [rms_norm(outs[0], scaled_norm(norm, scale)), *outs[1:]], lses, sources
    weight, norm_eps = norm or (None, None)
    if backward:
        results = InterBlock.apply(*distinct(queries, key_norms, weight, eps, norm_eps, scale, *sources))
        outs, lse, handed_on = results[: len(queries)], results[len(queries)], results[len(queries) + 1 :]
    else:
        inputs = (queries, key_norms, list(sources), weight, eps, norm_eps, scale, len(sources) > 1)
        outs, lse, _, _ = called(inter_block_now, inter_block_op)(*inputs)
        outs, handed_on = [*outs, *[sources[0]] * (len(queries) - len(outs))], sources
    return list(outs), list(lse.unbind(0)), list(handed_on)


def read_norm_chained(
    query: Tensor,
    sources: Sequence[Tensor],
    key_norm: Tensor | None,
    eps: float,
    *,
    scale: float = 1.0,
    norm: Norm | None,
    prior: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """`read_norm`, and the sources for their next reader. prior: (out, lse) of phase 1, from which the read goes on."""
    x, _, *handed_on = _read(query, sources, key_norm, eps, scale, norm, prior, hand_on=True)
    return x, handed_on


def differentiates(*tensors: Tensor | None) -> bool:
    """Whether a result of these has a gradient; torch.compile cannot trace a Function whose inputs need none."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _read(
    query: Tensor,
    sources: Sequence[Tensor],
    key_norm: Tensor | None,
    eps: float,
    scale: float,
    norm: Norm | None,
    prior: tuple[Tensor, Tensor] | None = None,
    hand_on: bool = False,
) -> tuple[Tensor, ...]:
    """x, what backward needs, and the sources if they are to be handed on."""
    key_norm = torch.ones_like(query) if key_norm is None else key_norm
    check_supported(sources[0], len(sources))
    (weight, norm_eps), (out, lse) = norm or (None, None), prior or (None, None)
    if differentiates(query, key_norm, out, lse, weight, *sources):
        return Read.apply(*distinct(query, key_norm, out, lse, weight, eps, norm_eps, scale, hand_on, *sources))
    results: Any = called(read_now, read_op)(query, key_norm, list(sources), out, lse, weight, eps, norm_eps, scale)
    return *results, *(sources if hand_on else ())


def _add_norm(stream: Tensor | None, update: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    check_supported(update)
    if differentiates(stream, update, norm[0]):
        return AddNorm.apply(*distinct(stream, update, *norm))
    total, x, _ = called(add_norm_now, add_norm_op)(stream, update, *norm)
    return update if stream is None else total, x
