"""Whether a decoder layer adds up as its entry in the table of architectures says.

The layer's own forward is run with stand-ins for its submodules, small functions that no two share, and its result is
compared with the entry's sum of the same stand-ins. So neither weights nor sizes matter, and a factor, a gate or a
dropout of the layer's own is noticed.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...errors import UsageError

if TYPE_CHECKING:
    from .table import Architecture

WIDTH = 8
FORMS: tuple[Callable[[Tensor], Any], ...] = (lambda x: x, lambda x: (x, None), lambda x: (x, None, None))
"""What attention and MLP return: their output, alone or first in a tuple."""


class StandIn(nn.Module):
    """In the place of a submodule: a smooth function of its own for every `number`, and `form` around the result."""

    def __init__(self, number: int, form: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.number, self.form = number, form

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        x = args[0] if args else kwargs["hidden_states"]
        return self.form(torch.tanh(x @ _numbers(self.number, WIDTH, WIDTH)))


def check_sum(layer: nn.Module, entry: Architecture, place: str) -> None:
    """Raises UsageError if the layer has parameters of its own or computes another sum. place: the layer in words."""
    own = [name for name, _ in (*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False))]
    if own:
        raise UsageError(f"{place} has {', '.join(own)} of its own, which an exact conversion does not know to use")
    stream = _numbers(0, 2, 3, WIDTH)
    expected = _described(layer, entry, _stand_ins(layer, entry, FORMS[0], FORMS[0]), stream)
    reasons = []
    for attention_form, mlp_form in product(FORMS, FORMS[:2]):
        try:
            found = _computed(layer, _stand_ins(layer, entry, attention_form, mlp_form), stream)
        except Exception as error:  # code of others, which may expect another form
            reasons.append(f"{type(error).__name__}: {error}")
            continue
        if found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-6, atol=1e-6):
            return
    if len(reasons) == len(FORMS) * 2:
        raise UsageError(f"{place} cannot be followed ({reasons[0]}), so what it computes is not known")
    raise UsageError(
        f"{place} computes another sum than the entry for {entry.model_type!r} describes: it rescales the stream or "
        f"what is added to it, or takes its submodules in another order"
    )


def _stand_ins(
    layer: nn.Module, entry: Architecture, attention: Callable[[Tensor], Any], mlp: Callable[[Tensor], Any]
) -> dict[str, nn.Module]:
    forms = {entry.attention_of(layer): attention, entry.mlp: mlp}
    names = sorted(entry.submodules(layer))
    return {name: StandIn(number, forms.get(name, FORMS[0])) for number, name in enumerate(names, 1)}


def _computed(layer: nn.Module, stand_ins: dict[str, nn.Module], stream: Tensor) -> Tensor:
    """What the layer's own forward makes of the stream, in training mode, so that its dropouts are seen."""
    hollow = copy.copy(layer)
    hollow._modules, hollow.training = dict(stand_ins), True
    hollow.gradient_checkpointing = False  # type: ignore[assignment]
    parameters = list(inspect.signature(type(layer).forward).parameters.values())[2:]
    required = {
        p.name: None for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    }
    output = type(layer).forward(hollow, stream, **required)
    return output[0] if isinstance(output, tuple) else output


def _described(layer: nn.Module, entry: Architecture, stand_ins: dict[str, nn.Module], stream: Tensor) -> Tensor:
    """What the entry says."""
    factor = 1.0 if entry.multiplier is None else getattr(layer, entry.multiplier)

    def added(h: Tensor, *names: str | None) -> Tensor:
        for name in names:
            h = h if name is None else stand_ins[name](h)
        return factor * h

    attention = added(stream, entry.attention_norm, entry.attention_of(layer), *entry.after_attention)
    read = stream if entry.is_parallel(layer) else stream + attention
    return stream + attention + added(read, entry.mlp_norm, entry.mlp, *entry.after_mlp)


def _numbers(seed: int, *shape: int) -> Tensor:
    """Fixed numbers between -1 and 1 on the CPU, whatever the default device and dtype."""
    count = torch.Size(shape).numel()
    return torch.cos(torch.arange(count, dtype=torch.float64, device="cpu") * (1 + 0.7 * seed) + seed).view(shape)
