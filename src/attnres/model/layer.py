"""What a layer is: an attention or a feed-forward network between a read and a write, its input norm included.

The decoder, counting, caches, the parallel split, the planner and the Hugging Face model know no kind of layer: they
ask. A new kind is one file under layers/ with a `register` line (`layers/sliding_window.py` is a short one):

    @register("mine")
    class Mine(Layer):
        def __init__(self, config, block): ...          # sets self.norm; block: its Transformer block, from 0
        def forward(self, x_BTD, context): ...
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar, cast

import torch
from torch import Tensor, nn

from ..errors import UsageError

if TYPE_CHECKING:
    from .config import DecoderShape


class Layer(nn.Module):
    """Base of every kind of layer."""

    word: ClassVar[str] = "attention"
    """What pages call it."""

    is_attention: ClassVar[bool] = True
    """Whether it is the first layer of a Transformer block, an attention, or the second, a feed-forward network."""

    roles: ClassVar[Mapping[str, str]] = {
        "o_proj": "output",
        "down_proj": "output",
        "q_proj": "query_key",
        "k_proj": "query_key",
    }
    """The role of a matrix by its name, "value" for all others: `Residual.init_scale` says how large it starts."""

    split: Mapping[str, int] = {}
    """What tensor parallelism splits: the path of a parameter in the layer -> the dimension. A path that does not end
    in the layer itself leads to a plain torch.nn.Linear. The layer must run with the first of equal parts as it runs
    with the whole, as if it had fewer heads or a smaller inner width, and its output is then a part of a sum. A kind
    that says nothing is refused there."""

    divides: ClassVar[tuple[str, ...]] = ()
    """The sizes of the config that such parts are parts of, so that the number of processes must divide them."""

    experts: ClassVar[tuple[str, ...]] = ()
    """Own parameters whose first dimension counts experts, which expert parallelism deals out."""

    cache_type: ClassVar[str] = "full_attention"
    """The kind of transformers' cache layers that holds what it keeps, and of masks that it gets: full_attention,
    sliding_attention (the last config.sliding_window tokens) or linear_attention (a state, and no mask)."""

    norm: nn.Module
    """The norm in front, which the residual connection's read has applied already unless `context.normalise` is set."""

    @classmethod
    def from_config(cls, config: DecoderShape, block: int) -> Self:
        """The layer of a Transformer block, counted from 0."""
        return cls(config, block)  # type: ignore[call-arg]

    @classmethod
    def check(cls, config: DecoderShape) -> None:
        """Raises UsageError for a config in which this kind cannot be."""

    def forward(self, x_BTD: Tensor, context: Any) -> Tensor:
        """The layer's output [B, T, D] for its already normalised input [B, T, D]. context: `layers.gqa.Context`."""
        raise NotImplementedError

    def initial_values(
        self, std: Callable[[str], float], generator: torch.Generator | None, device: torch.device
    ) -> Iterator[tuple[str, Tensor]]:
        """Name and initial value of every parameter of its own, those of linear layers and norms left out.

        std: standard deviation of a role, "value" (what reads the input) or "output" (what adds to the stream).
        """
        return iter(())

    def flops(self, context: int) -> float:
        """Forward operations per token in a context of that many: 2 for every weight of a matrix, and what a kind adds.

        Norms, rotary positions, activations and softmax are left out.
        """
        return 2.0 * sum(module.weight.numel() for module in self.modules() if isinstance(module, nn.Linear))

    def idle_parameters(self) -> int:
        """Of its parameters those that a token does not meet."""
        return 0

    @classmethod
    def kept(cls, config: DecoderShape) -> str:
        """What it keeps of earlier tokens, in words; caches of decoders that say the same are alike."""
        return f"what {cls.__name__} keeps"

    def keep(self, cache: Any, rows: int, tokens: int, dtype: torch.dtype) -> None:
        """Puts into a cache what it keeps of so many tokens (at least one), of the right sizes and any content."""

    @classmethod
    def paged(cls, config: DecoderShape) -> tuple[int, int, int] | None:
        """Heads, and widths of the keys and of the values, that it hands to attention; None if a page of keys and
        values, such as those of continuous batching, cannot hold what it keeps."""
        return None


def layers_of(model: nn.Module) -> list[Layer]:
    """The layers of a decoder, or those that a part of one has."""
    return cast(list[Layer], list(model.get_submodule("layers").children()))


def layer_input(layer: nn.Module, x_BTD: Tensor, context: Any) -> Tensor:
    """What a layer starts from: x [B, T, D], through the layer's norm first if the context says so."""
    if getattr(context, "normalise", False) is True:  # what traces a layer's projections gives no truth value
        x_BTD = layer.norm(x_BTD)  # type: ignore[operator]
    return x_BTD


_kinds: dict[str, type[Layer]] = {}
C = TypeVar("C", bound=type[Layer])


def register(name: str) -> Callable[[C], C]:
    """Class decorator that enters a kind of layer under `name`, for a config's attention_pattern or feed_forward.

    Raises ValueError if the name is taken.
    """

    def enter(cls: C) -> C:
        if name in _kinds:
            raise ValueError(f"layer {name!r} is already registered, by {_kinds[name].__qualname__}")
        _kinds[name] = cls
        return cls

    return enter


def kinds() -> list[type[Layer]]:
    """Every registered class, in the order of registration."""
    return list(_kinds.values())


def names(is_attention: bool = True) -> list[str]:
    """The registered kinds of attention, or of feed-forward networks, in the order of registration."""
    return [name for name, kind in _kinds.items() if kind.is_attention == is_attention]


def get(name: str, field: str, is_attention: bool = True) -> type[Layer]:
    """The class of a kind. Raises UsageError, which names the config's field, for an unknown one."""
    known = names(is_attention)
    if name not in known:
        raise UsageError(f"{field} has the unknown kind {name!r}; known: {', '.join(known)}")
    return _kinds[name]
