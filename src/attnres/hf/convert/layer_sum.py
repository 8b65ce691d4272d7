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
SHAPE = (5, 4, WIDTH)
"""Of the stream: more sequences than a layer expects values from a sublayer, so that none is unpacked for them."""
FORMS: tuple[Callable[[Tensor], Any], ...] = (lambda x: x, lambda x: (x, None), lambda x: (x, None, None))
"""What attention and MLP return: their output, alone or first in a tuple."""


class NotThisSum(UsageError):
    """A layer computes something else than an entry says."""


class StandIn(nn.Module):
    """In the place of a submodule: a smooth function of its own for every `number`, and `form` around the result."""

    def __init__(self, number: int, form: Callable[[Tensor], Any], adds: bool = False) -> None:
        super().__init__()
        self.number, self.form, self.adds = number, form, adds

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        x = args[0] if args else kwargs["hidden_states"]
        y = torch.tanh(x @ _numbers(self.number, WIDTH, WIDTH))
        if self.adds:
            y = y + (args[1] if len(args) > 1 else kwargs["residual"])
        return self.form(y)


def check_own(layer: nn.Module, place: str) -> None:
    """Raises UsageError if the layer has parameters of its own. place: the layer in words."""
    own = [name for name, _ in (*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False))]
    if own:
        raise UsageError(f"{place} has {', '.join(own)} of its own, which an exact conversion does not know to use")


def check_sum(layer: nn.Module, entry: Architecture, place: str) -> int:
    """How many values the layer returns in a tuple, 0 for the stream alone. place: the layer in words.

    Raises NotThisSum if it computes another sum."""
    stream = _numbers(0, *SHAPE)
    if entry.multiplier is not None and not isinstance(getattr(layer, entry.multiplier, None), int | float):
        raise NotThisSum(
            f"{place} has no number {entry.multiplier!r}, the factor in the entry for {entry.model_type!r}"
        )
    expected = _described(layer, entry, _stand_ins(entry, FORMS[0], FORMS[0]), stream)
    reasons = []
    for attention_form, mlp_form in product(FORMS, FORMS[:2]):
        try:
            made = _computed(layer, _stand_ins(entry, attention_form, mlp_form), stream)
        except Exception as error:  # code of others, which may expect another form
            reasons.append(f"{type(error).__name__}: {error}")
            continue
        found = first_of(made)
        alike = isinstance(found, Tensor) and found.shape == expected.shape
        if alike and torch.allclose(found, expected, rtol=1e-6, atol=1e-6):
            return len(made) if isinstance(made, tuple) else 0
    if len(reasons) == len(FORMS) * 2:
        raise NotThisSum(f"{place} cannot be followed ({reasons[0]}), so what it computes is not known")
    raise NotThisSum(
        f"{place} computes another sum than the entry for {entry.model_type!r} describes: it rescales the stream or "
        f"what is added to it, drops some of it at random (set its dropout to 0), or takes its submodules in another "
        f"order"
    )


def first_of(output: Any) -> Any:
    """What a module returns, alone or first in a tuple."""
    return output[0] if isinstance(output, tuple) else output


def _stand_ins(
    entry: Architecture, attention: Callable[[Tensor], Any], mlp: Callable[[Tensor], Any]
) -> dict[str, nn.Module]:
    forms = {entry.attention: attention, entry.mlp: mlp}
    return {
        name: StandIn(number, forms.get(name, FORMS[0]), name in entry.adds_itself)
        for number, name in enumerate(sorted(entry.submodules), 1)
    }


def _computed(layer: nn.Module, stand_ins: dict[str, nn.Module], stream: Tensor) -> Any:
    """What the layer's own forward makes of the stream, in training mode, so that its dropouts are seen."""
    hollow = copy.copy(layer)
    left_out = {name: None for name, module in layer._modules.items() if module is None}
    hollow._modules, hollow.training = {**stand_ins, **left_out}, True
    hollow.gradient_checkpointing = False  # type: ignore[assignment]
    parameters = list(inspect.signature(type(layer).forward).parameters.values())[2:]
    required = {
        p.name: None for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    }
    return type(layer).forward(hollow, stream, **required)


def _described(layer: nn.Module, entry: Architecture, stand_ins: dict[str, nn.Module], stream: Tensor) -> Tensor:
    """What the entry says."""
    factor = 1.0 if entry.multiplier is None else getattr(layer, entry.multiplier)

    def run(h: Tensor, *names: str | None) -> Tensor:
        for name in (name for name in names if name is not None):
            h = stand_ins[name](h, torch.zeros_like(h)) if name in entry.adds_itself else stand_ins[name](h)
        return h

    def feed_forward(h: Tensor) -> Tensor:
        x = run(h, entry.mlp_norm)
        beside = 0.0 if entry.beside_mlp is None else run(x, entry.beside_mlp)
        return factor * (run(x, entry.mlp, *entry.after_mlp) + beside)

    attention = factor * run(stream, entry.attention_norm, entry.attention, *entry.after_attention)
    return stream + attention + feed_forward(stream if entry.parallel else stream + attention)


def _numbers(seed: int, *shape: int) -> Tensor:
    """Fixed numbers between -1 and 1 on the CPU, whatever the default device and dtype."""
    count = torch.Size(shape).numel()
    return torch.cos(torch.arange(count, dtype=torch.float64, device="cpu") * (1 + 0.7 * seed) + seed).view(shape)
