"""Gradients of the calls into C. Sources are handed on: a source's gradient runs through its readers as a chain.

A backward pass that is itself to be differentiated, or vectorised, is made by the formulas instead.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from ..formulas import mix
from ..reference import Reference
from . import calls
from .calls import Form

_TRUTH = Reference()


class Read(torch.autograd.Function):
    """S reads, their log-sum-exps [S, ...] or None, the statistics, and then the sources, if they have later readers.

    query, key_norm: [S, D], [D], or of a part of the width. weight: of the norm that follows the first read. prior,
    prior_lse: what this goes on from. addend: is added to the first source, and the sum handed on in its place."""

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
        outs, lse, stats, total = calls.read(
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
        query, key_norm, weight, prior, prior_lse, stats, *sources = ctx.saved_tensors
        count = ctx.count
        later = gradients[count + 2 :] or [None] * len(sources)
        if _beyond_c(*gradients):
            given = (query, key_norm, weight, prior, prior_lse, *sources)
            slow = _by_formulas(partial(_reads, ctx.form), given, [*gradients[: count + 1], *later])
            return None, None, *slow[:5], slow[5] if ctx.added else None, *slow[5:]
        made = calls.read_backward(
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


class Mix(torch.autograd.Function):
    """sum_i weights[i] * sources[i], and the sources."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, *sources: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(weights, *sources)
        return calls.mix(weights, sources), *sources

    @staticmethod
    def backward(ctx: Any, dh: Tensor | None, *later: Tensor | None) -> tuple[Any, ...]:
        weights, *sources = ctx.saved_tensors
        if dh is None:
            return None, *later
        if _beyond_c(dh, *later):
            return tuple(_by_formulas(lambda w, *rows: [mix(w, rows), *rows], (weights, *sources), (dh, *later)))
        dweights, made = calls.mix_backward(weights, sources, dh, later)
        return _like(dweights, weights), *made


class AddNorm(torch.autograd.Function):
    """(stream + update or update, its norm)."""

    @staticmethod
    def forward(
        ctx: Any, stream: Tensor | None, update: Tensor, weight: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor]:
        total, x, stats = calls.add_norm(stream, update, weight, eps, keep=True)
        if stream is None:
            total = update
        ctx.eps, ctx.added = eps, stream is not None
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(total, weight, stats)
        return total, x

    @staticmethod
    def backward(ctx: Any, dtotal: Tensor | None, dx: Tensor | None) -> tuple[Any, ...]:
        total, weight, stats = ctx.saved_tensors
        if _beyond_c(dtotal, dx):
            made, dweight = _by_formulas(
                lambda h, w: [h, _TRUTH.rms_norm(h, (w, ctx.eps))], (total, weight), (dtotal, dx)
            )
            return made if ctx.added else None, made, dweight, None
        if dx is None:
            return dtotal if ctx.added else None, dtotal, None, None
        made, dweight = calls.add_norm_backward(total, weight, stats, dx, dtotal, ctx.eps)
        return made if ctx.added else None, made, _like(dweight, weight), None


def _like(gradient: Tensor | None, tensor: Tensor | None) -> Tensor | None:
    return None if gradient is None or tensor is None else gradient.view_as(tensor).to(tensor.dtype)


def _beyond_c(*gradients: Tensor | None) -> bool:
    """Whether a graph of the backward pass is wanted, or many gradients go through it at once (`vmap`)."""
    return torch.is_grad_enabled() or any(
        t is not None and calls.plain(t) and not torch._C._has_storage(t) for t in gradients
    )


def _reads(
    form: Form, query: Tensor, key_norm: Tensor | None, weight: Tensor | None, prior: Tensor | None,
    prior_lse: Tensor | None, *sources: Tensor,
) -> list[Tensor]:  # fmt: skip
    """What `Read` returns, but for the statistics."""
    norm = None if form.norm_eps is None else (weight, form.norm_eps)
    if form.phase_1:
        outs, lses, _ = _TRUTH.inter_block_chained(query, sources, key_norm, form.eps, norm=norm)
        return [*outs, torch.stack(lses), *sources]
    before = None if prior is None or prior_lse is None else (prior, prior_lse)
    out = _TRUTH.read_norm(query, sources, key_norm, form.eps, scale=form.scale, norm=norm, prior=before)
    return [out, query, *sources]  # the query stands for a log-sum-exp, which has no gradient


def _by_formulas(
    formulas: Callable[..., Sequence[Tensor]], given: Sequence[Tensor | None], gradients: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """The gradients of what is given, as results of operations of PyTorch."""
    with torch.enable_grad():
        apart = [None if t is None else t.view_as(t) for t in given]  # one of them may have been made from another
        results = [
            (r, g) for r, g in zip(formulas(*apart), gradients, strict=True) if g is not None and r.requires_grad
        ]
        wanted = [t for t in apart if t is not None and t.requires_grad]
        outs, into = [r for r, _ in results], [g for _, g in results]
        made = torch.autograd.grad(outs, wanted, into, create_graph=True, allow_unused=True) if outs else repeat(None)
    found = iter(made)
    return [next(found) if t is not None and t.requires_grad else None for t in apart]
