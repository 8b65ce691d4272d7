"""What a decoder keeps of earlier tokens: keys and values, latents, or the state of a recurrence, layer by layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import UsageError

if TYPE_CHECKING:
    from .config import DecoderConfig


class KeyValueCache:
    """Earlier tokens as each attention layer wants them; it grows as tokens come.

    A grouped-query layer puts in keys and values [B, K, T, E]; a latent one its latents [B, 1, T, R] and shared keys
    [B, 1, T, P]; a linear one a state of fixed size. A decoder claims the cache at first use, and another architecture
    is refused from then on.
    """

    def __init__(self) -> None:
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        self.states: dict[int, Any] = {}
        self.owner: tuple[str, ...] = ()

    def claim(self, config: DecoderConfig) -> None:
        """Makes this the cache of a decoder of that shape. Raises UsageError if it is that of another one."""
        layout = cache_layout(config)
        if self.owner and self.owner != layout:
            ours, theirs = _first_difference(self.owner, layout)
            raise UsageError(
                f"the cache is of another architecture: it holds {ours}, and this model needs {theirs}; start a new "
                "cache for this model"
            )
        self.owner = layout

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        if layer_idx in self.keys:
            key_states = torch.cat([self.keys[layer_idx], key_states], 2)
            value_states = torch.cat([self.values[layer_idx], value_states], 2)
        self.keys[layer_idx], self.values[layer_idx] = key_states, value_states
        return key_states, value_states

    def linear_state(self, layer_idx: int) -> Any:
        """The state that a linear attention layer left, or None before its first token."""
        return self.states.get(layer_idx)

    def set_linear_state(self, layer_idx: int, state: Any) -> None:
        self.states[layer_idx] = state

    def get_seq_length(self) -> int:
        """Tokens held; 0 if all layers are linear, which need no positions and no mask."""
        return next(iter(self.keys.values())).shape[2] if self.keys else 0


def cache_layout(config: DecoderConfig) -> tuple[str, ...]:
    """What each attention layer of a decoder of that shape keeps, in words."""
    return tuple(kind.kept(config) for kind in config.layer_kinds if kind.is_attention)


def _first_difference(ours: tuple[str, ...], theirs: tuple[str, ...]) -> tuple[str, str]:
    for layer, (a, b) in enumerate(zip(ours, theirs, strict=False)):
        if a != b:
            return f"{a} in attention layer {layer}", b
    return f"{len(ours)} attention layers", f"{len(theirs)}"
