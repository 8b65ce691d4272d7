"""The native backend: depth attention on CPUs in C, one call for a read and the norm that follows it.

For bf16, fp16, fp32 and fp64 tensors of any width and any number of sources. Results do not depend on whether gradients
are wanted, and gradients are the same bits for the same number of threads.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _len_torch_dispatch_stack

from ..autograd import differentiates
from ..backend import Backend
from ..formulas import Norm, Prior, scaled_norm
from . import calls
from .autograd import AddNorm, Mix, Read
from .build import TYPES
from .build import library as compiled
from .calls import Form, plain


class Native(Backend):
    two_phase_pays = True
    takes_slices = True

    def declines(self, source: Tensor, num_sources: int) -> str | None:
        if not source.is_cpu:
            return f"the native backend takes tensors on a CPU; sources are on {source.device.type}"
        if source.dtype not in TYPES:
            return f"the native backend takes bfloat16, float16, float32 and float64; sources are {source.dtype}"
        if not plain(source):
            return f"the native backend takes plain tensors; sources are {type(source).__name__}s"
        if (
            torch.compiler.is_compiling() or _len_torch_dispatch_stack() or torch.jit.is_tracing()
            or peek_interpreter_stack() is not None or forward_ad._current_level >= 0
        ):  # fmt: skip
            return "something records or transforms operations of PyTorch, which the native backend does not consist of"
        made = compiled(source.dtype)
        return made if isinstance(made, str) else None

    def read_with_weights(
        self, query: Tensor, sources: Sequence[Tensor], key_norm: Tensor | None, eps: float, scale: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """The weights are without gradient."""
        form = Form(eps, scale=scale, heads=_heads(query))
        h, _, stats, *_ = _read(form, query, sources, key_norm, keep=True)
        weights = stats[..., : len(sources)].softmax(-1).movedim(-1, 0)
        return h, weights.view(*weights.shape[: h.dim()], *query.shape[:-1])

    def inter_block(
        self, queries: Tensor, sources: Sequence[Tensor], key_norms: Tensor | None, eps: float
    ) -> tuple[list[Tensor], list[Tensor]]:
        return self.inter_block_chained(queries, sources, key_norms, eps)[:2]

    def read_norm(
        self, query: Tensor, sources: Sequence[Tensor], key_norm: Tensor | None, eps: float, *,
        scale: float = 1.0, norm: Norm | None = None, prior: Prior | None = None,
    ) -> Tensor:  # fmt: skip
        return _single_read(query, sources, key_norm, eps, scale, norm, prior)[0]

    def read_norm_chained(
        self, query: Tensor, sources: Sequence[Tensor], key_norm: Tensor | None, eps: float, *,
        scale: float = 1.0, norm: Norm | None = None, prior: Prior | None = None,
    ) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
        x, _, _, *handed_on = _single_read(query, sources, key_norm, eps, scale, norm, prior, hand_on=True)
        return x, handed_on

    def inter_block_chained(
        self, queries: Tensor, sources: Sequence[Tensor], key_norms: Tensor | None, eps: float, *,
        scale: float = 1.0, norm: Norm | None = None,
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:  # fmt: skip
        weight, form = _form(eps, scale, norm) if norm is not None else (None, Form(eps))
        count = len(queries)
        made = _read(form._replace(phase_1=True), queries, sources, key_norms, weight, hand_on=True)
        return list(made[:count]), list(made[count].unbind(0)), list(made[count + 2 :])

    def merge_norm(
        self, query: Tensor, partial: Tensor | None, update: Tensor, key_norm: Tensor | None, out: Tensor, lse: Tensor,
        eps: float, *, scale: float = 1.0, norm: Norm | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        weight, form = _form(eps, scale, norm)
        x, _, _, total = _read(form, query, [update], key_norm, weight, (out, lse), partial, hand_on=True)
        return total, x

    def add_norm(self, stream: Tensor, update: Tensor, *, norm: Norm | None = None) -> tuple[Tensor, Tensor]:
        return super().add_norm(stream, update) if norm is None else _add_norm(stream, update, norm)

    def weighted_sum(self, weights: Tensor, sources: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        if differentiates(weights, *sources):
            h, *handed_on = Mix.apply(weights, *sources)
            return h, handed_on
        return calls.mix(weights, sources), list(sources)

    def rms_norm(self, h: Tensor, norm: Norm | None) -> Tensor:
        return h if norm is None else _add_norm(None, h, norm)[1]


NATIVE = Native()


def _heads(query: Tensor) -> int:
    return 1 if query.dim() == 1 else len(query)


def _form(eps: float, scale: float, norm: Norm | None) -> tuple[Tensor | None, Form]:
    if norm is None:
        return None, Form(eps, scale=scale)
    weight, norm_eps = scaled_norm(norm, scale)
    return weight, Form(eps, norm_eps)


def _read(
    form: Form, query: Tensor, sources: Sequence[Tensor], key_norm: Tensor | None, weight: Tensor | None = None,
    prior: Prior | None = None, addend: Tensor | None = None, hand_on: bool = False, keep: bool = False,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The results of `Read`, with gradients or without; without, statistics are there for `keep` alone."""
    out, lse = prior or (None, None)
    if differentiates(query, key_norm, weight, out, lse, addend, *sources):
        return Read.apply(form, hand_on, query, key_norm, weight, out, lse, addend, *sources)
    made = calls.read(form, query, key_norm, weight, out, lse, addend, sources, keep)
    outs = [sources[0].view_as(sources[0]) if row is None else row for row in made.outs]
    handed_on = sources if made.total is None else (made.total, *sources[1:])
    return *outs, made.lse, made.stats, *(handed_on if hand_on else ())  # type: ignore[return-value, arg-type]


def _single_read(
    query: Tensor, sources: Sequence[Tensor], key_norm: Tensor | None, eps: float, scale: float, norm: Norm | None,
    prior: Prior | None, hand_on: bool = False,
) -> tuple[Tensor, ...]:  # fmt: skip
    weight, form = _form(eps, scale, norm)
    heads = _heads(query)
    if heads == 1 or norm is None:
        return _read(form._replace(heads=heads), query, sources, key_norm, weight, prior, hand_on=hand_on)
    # the norm takes whole rows, of which a head has a part
    h, *others = _read(Form(eps, heads=heads), query, sources, key_norm, prior=prior, hand_on=hand_on)
    return _add_norm(None, h, scaled_norm(norm, scale))[1], *others


def _add_norm(stream: Tensor | None, update: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    if differentiates(stream, update, norm[0]):
        return AddNorm.apply(stream, update, *norm)
    total, x, _ = calls.add_norm(stream, update, *norm, keep=False)
    return update if stream is None else total, x
