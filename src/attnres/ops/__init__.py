"""Depth attention as functions of tensors.

A read (`depth_attention`) attends over depth at every token; the two phases (`inter_block`, then one `merge` per layer)
compute the same reads with one pass over the finished blocks. Shapes: D is the width, [...] any leading dimensions
(batch, tokens), n the number of sources, S the number of queries. Sources are a sequence and are never stacked. bf16,
fp16, fp32 and fp64; statistics and softmax are fp32 (fp64 for fp64). Every op is differentiable in every tensor
argument.

Arguments are checked here, once; backends take what they are given. Without gradients on a CPU, as in decoding, the
forms that residual connections use skip most checks: they would cost as much as the ops.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import installation  # noqa: F401  first: it raises where another package took this one's place
from .backend import Backend
from .check import (
    check_norm,
    check_queries,
    check_read,
    check_scale,
    check_sources,
    check_statistics,
    check_vectors,
    check_weights,
)
from .dispatch import backend, select, set_backend
from .formulas import Norm, Prior, fold

__all__ = [
    "Backend",
    "Norm",
    "add_norm",
    "backend",
    "depth_attention",
    "fold",
    "inter_block",
    "inter_block_chained",
    "merge",
    "merge_norm",
    "read_norm",
    "read_norm_chained",
    "rms_norm",
    "set_backend",
    "weighted_sum",
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
    """One read: h = scale * sum_i softmax_i(query . RMSNorm(v_i)) v_i  (paper section 2, full attention over depth).

    Args:
        query: the layer's pseudo-query, [D]; [H, D / H] for H slices of the width with weights of their own (arXiv
            2607.27230); or [r], r < D, for keys that are the last r channels of a source (arXiv 2607.09694).
        sources: n tensors [..., D] of one shape, dtype and device: the embedding and the earlier outputs or blocks.
        key_norm: weight of the RMSNorm on the keys, of the query's shape. Values stay un-normalised.
        eps: added to the mean square of a source before the root.
        return_weights: also return the softmax weights [n, ...], with slices [n, ..., H] (fp32, fp64 for fp64 inputs;
            without gradient on the fast backends).
        scale: multiplies the result; n puts a read on the scale of a plain residual sum.

    Returns h [..., D] in the dtype of the sources, or (h, weights). Raises ValueError naming the argument that does not
    fit.
    """
    check_read(query, sources, key_norm)
    check_scale(eps, scale)
    chosen = select(sources[0], len(sources), query)
    if return_weights:
        return chosen.read_with_weights(query, sources, key_norm, eps, scale)
    return chosen.read_norm(query, sources, key_norm, eps, scale=scale)


def inter_block(
    queries: Tensor, sources: Sequence[Tensor], key_norms: Tensor, eps: float = 1e-6
) -> tuple[list[Tensor], list[Tensor]]:
    """Phase 1: all S reads of a block over the finished blocks at once (paper section 4).

    Args:
        queries, key_norms: [S, D], one row a layer of the block.
        sources: n finished blocks [..., D] of one shape, dtype and device.

    Returns (out, lse): S normalised reads [..., D] in the dtype of the sources, and S log-sum-exps of their logits
    [...] in fp32 (fp64 for fp64 inputs). Raises ValueError naming the argument that does not fit.
    """
    check_sources(sources)
    check_queries(queries, key_norms, sources[0].shape[-1], sources[0].device)
    check_scale(eps)
    return select(sources[0], len(sources)).inter_block(queries, sources, key_norms, eps)


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
    """Phase 2 for one layer: joins the block's partial sum to phase 1's read by online softmax (paper section 4).

    Args:
        query, key_norm: [D], the layer's own.
        partial: sum of the block's layers so far, [..., D].
        out, lse: this layer's entries of `inter_block`, [..., D] and [...].
        scale: multiplies the result, as in `depth_attention`.

    Returns h [..., D], equal to depth_attention over the finished blocks and the partial sum. Raises ValueError naming
    the argument that does not fit.
    """
    check_sources([partial, out], "(partial, out)")
    check_vectors(partial.shape[-1], partial.device, query=query, key_norm=key_norm)
    check_statistics(lse, out)
    check_scale(eps, scale)
    return select(partial).merge_norm(query, None, partial, key_norm, out, lse, eps, scale=scale)[1]


def read_norm(
    query: Tensor,
    sources: Sequence[Tensor],
    key_norm: Tensor | None,
    eps: float,
    *,
    scale: float = 1.0,
    norm: Norm | None = None,
) -> Tensor:
    """`depth_attention` followed by the RMSNorm `norm` = (weight [D] or None, eps), fused where the backend can.

    key_norm: None for a query that has been folded.
    """
    if _careful(sources[0]):
        check_read(query, sources, key_norm, norm)
    return select(sources[0], len(sources), query).read_norm(query, sources, key_norm, eps, scale=scale, norm=norm)


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
    norm: Norm | None = None,
) -> tuple[Tensor, Tensor]:
    """Adds `update` to `partial` (None: the block's first output), merges, normalises: one launch on a GPU.

    key_norm: None for a query that has been folded.
    Returns (the new partial sum [..., D], RMSNorm(h) or h [..., D]).
    """
    if _careful(update) or update.shape != out.shape:
        check_sources([update, out] if partial is None else [partial, update, out], "(partial, update, out)")
        check_vectors(update.shape[-1], update.device, query=query, key_norm=query if key_norm is None else key_norm)
        check_statistics(lse, out)
        check_norm(norm, update)
    return select(update).merge_norm(query, partial, update, key_norm, out, lse, eps, scale=scale, norm=norm)


def add_norm(stream: Tensor, update: Tensor, *, norm: Norm | None = None) -> tuple[Tensor, Tensor]:
    """The standard residual's step: (stream + update, its RMSNorm), fused where the backend can."""
    if _careful(stream) or stream.shape != update.shape:
        check_sources([stream, update], "(stream, update)")
        check_norm(norm, stream)
    return select(stream).add_norm(stream, update, norm=norm)


def weighted_sum(weights: Tensor, sources: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """(sum_i weights[i] * sources[i] [..., D], the sources for their next reader, as in `read_norm_chained`).

    weights: [n] or, one a token, [n, ...]; used as they are. Raises ValueError naming the argument that does not fit.
    """
    if _careful(sources[0]):
        check_sources(sources)
        check_weights(weights, sources)
    return select(sources[0], len(sources)).weighted_sum(weights, sources)


def rms_norm(h: Tensor, norm: Norm) -> Tensor:
    """RMSNorm of h [..., D] over its last dimension with norm = (weight [D] or None, eps), in the dtype of h."""
    check_sources([h], "(h,)")
    check_norm(norm, h)
    return select(h).rms_norm(h, norm)


def inter_block_chained(
    queries: Tensor,
    sources: Sequence[Tensor],
    key_norms: Tensor | None,
    eps: float,
    *,
    scale: float = 1.0,
    norm: Norm | None = None,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """`inter_block` that also hands the sources on. Later readers take the returned ones: a source's gradient then runs
    through its readers as a chain and is written once a block, instead of being summed by autograd once a layer.

    key_norms: None for queries that have been folded. norm: of the block's first layer, which reads nothing else: the
    first read then comes multiplied by `scale` and normalised.
    """
    if _careful(sources[0]):
        check_sources(sources)
        check_queries(queries, queries if key_norms is None else key_norms, sources[0].shape[-1], sources[0].device)
        check_norm(norm, sources[0])
    chosen = select(sources[0], len(sources))
    return chosen.inter_block_chained(queries, sources, key_norms, eps, scale=scale, norm=norm)


def read_norm_chained(
    query: Tensor,
    sources: Sequence[Tensor],
    key_norm: Tensor | None,
    eps: float,
    *,
    scale: float = 1.0,
    norm: Norm | None = None,
    prior: Prior | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """`read_norm` that also hands the sources on, for the same reason as `inter_block_chained`.

    prior: one entry each of phase 1's (out, lse), [..., D] and [...]; the read goes on from it, as if it had read those
    sources too.
    """
    if _careful(sources[0]):
        check_read(query, sources, key_norm, norm)
        if prior is not None:
            check_sources([sources[0], prior[0]], "(source, out)")
            check_statistics(prior[1], prior[0])
    chosen = select(sources[0], len(sources), query)
    return chosen.read_norm_chained(query, sources, key_norm, eps, scale=scale, norm=norm, prior=prior)


def _careful(source: Tensor) -> bool:
    """Whether the check is cheap beside the op, or the op is a kernel, which would read beyond the end."""
    return torch.is_grad_enabled() or not source.is_cpu or backend() == "triton" or isinstance(backend(), Backend)
