"""Hugging Face's caches as the decoder's layers see them: with states of linear attention.

The state of a Kimi Delta Attention layer lies in transformers' cache layer for linear attention, so that beam search,
repetition and offloading move it like keys and values.
"""

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, LinearAttentionCacheLayerMixin

from ..errors import UsageError
from ..model.layers.gqa import Attention
from ..model.layers.kda import KDAState
from .configuration import AttnResConfig


class LayerCache:
    """A Hugging Face cache with the interface of `attnres.model.layers.gqa.Cache`."""

    def __init__(self, cache: Cache) -> None:
        self.cache = cache

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        return self.cache.update(key_states, value_states, layer_idx)

    def get_seq_length(self) -> int:
        return self.cache.get_seq_length()

    def linear_state(self, layer_idx: int) -> KDAState | None:
        layer: Any = self.cache.layers[layer_idx]
        return KDAState(layer.conv_states[0], layer.recurrent_states[0]) if layer.has_previous_state[0] else None

    def set_linear_state(self, layer_idx: int, state: KDAState) -> None:
        # a convolution's state is as long as it needs to be, so the new one pushes the whole old one out
        self.cache.update_conv_state(state.conv, layer_idx)
        self.cache.update_recurrent_state(state.memory, layer_idx)


def check_cache(cache: Cache, config: AttnResConfig) -> None:
    """Raises UsageError if the cache has other layers than a model of that config."""
    if not config.counts_tokens:
        raise UsageError(
            "a Hugging Face cache counts tokens in full attention layers, and this model has none; use "
            "use_cache=False, or attnres.model.generate"
        )
    found = [
        "linear_attention"
        if isinstance(layer, LinearAttentionCacheLayerMixin)
        else "sliding_attention"
        if getattr(layer, "is_sliding", False)
        else "full_attention"
        for layer in cache.layers
    ]
    grows = getattr(cache, "layer_class_to_replicate", None) is not None
    expected = config.layer_types[: len(found)] if grows else config.layer_types
    if found != expected or (grows and set(config.layer_types) != {"full_attention"}):
        raise UsageError(
            f"past_key_values is the cache of another architecture: its layers are {_words(found)}, and this model "
            f"needs {_words(config.layer_types)}; use DynamicCache(config=model.config)"
        )


def check_generation(config: AttnResConfig, use_cache: bool | None) -> None:
    """Raises UsageError if `generate` would make a cache, which it does unless use_cache is False, that cannot be."""
    if use_cache is not False and not config.counts_tokens:
        raise UsageError(
            "generate needs use_cache=False: transformers' caches, static and offloaded ones too, count their tokens "
            "in full attention layers, and this model has linear attention alone; attnres.model.generate keeps its "
            "states"
        )


def check_paged(config: AttnResConfig) -> None:
    """Raises UsageError if transformers' paged cache, that of continuous batching, has no place for what layers keep.

    It holds keys and values of num_key_value_heads times head_dim for every layer.
    """
    page = Attention.paged(config)
    for name, kind in zip(config.attention_kinds, config.layer_kinds[::2], strict=True):
        if kind.paged(config) != page:
            raise UsageError(
                f"continuous batching keeps {config.num_key_value_heads} keys and values of width {config.head_dim} a "
                f"layer and token, and the {name} layers of this model need something else; use generate, which "
                "batches the prompts of one call"
            )


def _words(kinds: list[str]) -> str:
    return ", ".join(f"{kinds.count(kind)} of {kind}" for kind in sorted(set(kinds))) or "none yet"
