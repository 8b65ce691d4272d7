"""Autograd of the Triton ops: each reads its sources and hands them on.

A source has one reader a layer or a block. Autograd sums a tensor's gradients with one add, three rows of traffic, for
every reader after the first. A chained op returns its sources too, and the next reader takes what was returned: a
source's gradient is then a chain in which each backward kernel adds its part to what later readers left.

While torch.compile traces, kernels are called as custom ops, opaque to it. Otherwise they are called as functions: the
dispatch of a custom op takes longer than many a kernel runs.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .inter_block import inter_block, inter_block_gradients, inter_block_gradients_op, inter_block_op
from .merge import merge, merge_gradients, merge_gradients_op, merge_op
from .norm import add_norm, add_norm_gradients, add_norm_gradients_op, add_norm_op
from .read import read, read_gradients, read_gradients_op, read_op


def called(function: Callable[..., Any], op: Callable[..., Any]) -> Callable[..., Any]:
    """How a kernel is called: as the custom op while somebody traces."""
    return op if torch.compiler.is_compiling() else function


def handed_on(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The sources as results: autograd makes the views itself, but not while torch.compile traces."""
    return tuple(t.view_as(t) for t in tensors) if torch.compiler.is_compiling() else tuple(tensors)


def _or_zeros(gradients: Sequence[Tensor | None], like: Tensor) -> list[Tensor]:
    """Gradients with zeros for the missing ones; the zeros are one tensor."""
    if all(gradient is not None for gradient in gradients):
        return list(gradients)  # type: ignore[arg-type]
    zeros = torch.zeros_like(like)
    return [zeros if gradient is None else gradient for gradient in gradients]


def _left_by_later_readers(gradients: Sequence[Tensor | None], like: Tensor) -> list[Tensor]:
    return [] if all(gradient is None for gradient in gradients) else _or_zeros(gradients, like)


class Read(torch.autograd.Function):
    """x, what `read` keeps, and the sources if they have later readers. prior, prior_lse: the read that this one goes
    on from, or None.

    A source that nobody reads again is better not handed on: a compiler would make its missing gradient of zeros."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key_norm: Tensor,
        prior: Tensor | None,
        prior_lse: Tensor | None,
        weight: Tensor | None,
        eps: float,
        norm_eps: float | None,
        scale: float,
        hand_on: bool,
        *sources: Tensor,
    ) -> tuple[Tensor, ...]:
        x, stats = called(read, read_op)(query, key_norm, list(sources), prior, prior_lse, weight, eps, norm_eps, scale)
        ctx.norm_eps, ctx.scale = norm_eps, scale
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(stats)
        ctx.save_for_backward(query, key_norm, prior, prior_lse, weight, stats, *sources)
        return x, stats, *(handed_on(sources) if hand_on else ())

    @staticmethod
    def backward(ctx: Any, dx: Tensor | None, _: None, *later: Tensor | None) -> tuple[Any, ...]:  # type: ignore[override]
        query, key_norm, prior, prior_lse, weight, stats, *sources = ctx.saved_tensors
        (dx,) = _or_zeros([dx], sources[0])
        left = _left_by_later_readers(later, sources[0])
        dquery, dkey_norm, dsources, dprior, dprior_lse, dweight = called(read_gradients, read_gradients_op)(
            query, key_norm, sources, prior, prior_lse, weight, stats, dx, left, ctx.norm_eps, ctx.scale
        )
        of_prior = (None, None) if prior is None else (dprior, dprior_lse)
        return dquery, dkey_norm, *of_prior, None if weight is None else dweight, None, None, None, None, *dsources


class InterBlock(torch.autograd.Function):
    """S reads, their log-sum-exps [S, ...] and the sources. norm_eps: the first read comes with its scale and norm. The
    read of one source is that source, by every query."""

    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        key_norms: Tensor,
        weight: Tensor | None,
        eps: float,
        norm_eps: float | None,
        scale: float,
        *sources: Tensor,
    ) -> tuple[Tensor, ...]:
        outs, lse, logits, rstd = called(inter_block, inter_block_op)(
            queries, key_norms, list(sources), weight, eps, norm_eps, scale, len(sources) > 1
        )
        ctx.norm_eps, ctx.scale, ctx.num_queries = norm_eps, scale, len(queries)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(queries, key_norms, weight, lse, logits, rstd, *sources)
        if len(sources) == 1:
            outs = [*outs, *(sources[0].view_as(sources[0]) for _ in range(len(queries) - len(outs)))]
        return *outs, lse, *handed_on(sources)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:  # type: ignore[override]
        queries, key_norms, weight, lse, logits, rstd, *sources = ctx.saved_tensors
        douts, dlse, *later = gradients[: ctx.num_queries], *gradients[ctx.num_queries :]
        dqueries, dkey_norms, dsources, dweight = called(inter_block_gradients, inter_block_gradients_op)(
            queries,
            key_norms,
            sources,
            weight,
            lse,
            logits,
            rstd,
            _or_zeros(douts, sources[0]),
            *_or_zeros([dlse], lse),
            _left_by_later_readers(later, sources[0]),
            ctx.norm_eps,
            ctx.scale,
        )
        return dqueries, dkey_norms, None if weight is None else dweight, None, None, None, *dsources


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
        (dx,) = _or_zeros([dx], total)
        dquery, dkey_norm, dtotal, dout, dlse, dweight = called(merge_gradients, merge_gradients_op)(
            query, key_norm, total, out, lse, weight, stats, dx, later, ctx.norm_eps, ctx.scale
        )
        dpartial = dtotal if ctx.added else None
        return dquery, dkey_norm, dpartial, dtotal, dout, dlse, None if weight is None else dweight, None, None, None


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
        (dx,) = _or_zeros([dx], total)
        dtotal, dweight = called(add_norm_gradients, add_norm_gradients_op)(total, weight, rstd, dx, later)
        return dtotal if ctx.added else None, dtotal, None if weight is None else dweight, None
