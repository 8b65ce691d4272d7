"""Gradients of the calls into C. Sources are handed on: a source's gradient runs through its readers as a chain."""

from typing import Any

import torch
from torch import Tensor

from . import library
from .library import Form


class Read(torch.autograd.Function):
    """S reads, their log-sum-exps [S, ...] or None, the statistics, and then the sources, if they have later readers.

    query, key_norm: [S, D] or [D]. weight: of the norm that follows the first read. prior, prior_lse: what this
    goes on from. addend: is added to the first source, and the sum handed on in its place."""

    @staticmethod
    def forward(
        ctx: Any,
        form: Form,
        hand_on: bool,
        query: Tensor,
        key_norm: Tensor | None,
        weight: Tensor | None,
        prior: Tensor | None,
        prior_lse: Tensor | None,
        addend: Tensor | None,
        *sources: Tensor,
    ) -> tuple[Any, ...]:
        outs, lse, stats, total = library.read(
            form, query, key_norm, weight, prior, prior_lse, addend, sources, keep=True
        )
        read = sources if total is None else (total, *sources[1:])
        assert stats is not None
        ctx.form, ctx.count, ctx.added = form, len(outs), addend is not None
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(stats)
        ctx.save_for_backward(query, key_norm, weight, prior, prior_lse, stats, *read)
        shown = (sources[0].view_as(sources[0]) if out is None else out for out in outs)
        return *shown, lse, stats, *(read if hand_on else ())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        _refuse_a_graph()
        query, key_norm, weight, prior, prior_lse, stats, *sources = ctx.saved_tensors
        count = ctx.count
        later = gradients[count + 2 :] or [None] * len(sources)
        made = library.read_backward(
            ctx.form,
            query,
            key_norm,
            weight,
            prior,
            prior_lse,
            sources,
            stats,
            gradients[:count],
            gradients[count],
            later,
        )
        return (
            None,
            None,
            _like(made.query, query),
            _like(made.key_norm, key_norm),
            _like(made.weight, weight),
            made.prior,
            made.prior_lse,
            made.sources[0] if ctx.added else None,
            *made.sources,
        )


class AddNorm(torch.autograd.Function):
    """(stream + update or update, its norm)."""

    @staticmethod
    def forward(
        ctx: Any, stream: Tensor | None, update: Tensor, weight: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor]:
        total, x, stats = library.add_norm(stream, update, weight, eps, keep=True)
        if stream is None:
            total = update
        ctx.eps, ctx.added = eps, stream is not None
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(total, weight, stats)
        return total, x

    @staticmethod
    def backward(ctx: Any, dtotal: Tensor | None, dx: Tensor | None) -> tuple[Any, ...]:
        _refuse_a_graph()
        total, weight, stats = ctx.saved_tensors
        if dx is None:
            return dtotal if ctx.added else None, dtotal, None, None
        made, dweight = library.add_norm_backward(total, weight, stats, dx, dtotal, ctx.eps)
        return made if ctx.added else None, made, _like(dweight, weight), None


def _like(gradient: Tensor | None, tensor: Tensor | None) -> Tensor | None:
    return None if gradient is None or tensor is None else gradient.view_as(tensor).to(tensor.dtype)


def _refuse_a_graph() -> None:
    """Raises RuntimeError in a backward pass that is to be differentiated: its results would count as constants."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "the native backend has no second derivatives (create_graph=True); call ops.set_backend('reference') first"
        )
