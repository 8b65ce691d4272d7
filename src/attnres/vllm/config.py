"""What vLLM asks about a model's config before it starts its processes."""

from typing import Any

from vllm.model_executor.models.config import VerifyAndUpdateConfig

from ..errors import UsageError
from ..hf import AttnResConfig
from ..model.layer import Layer
from ..model.layers.feed_forward import FeedForward
from ..model.layers.gqa import Attention
from ..model.layers.sliding_window import SlidingWindowAttention

SERVED: tuple[type[Layer], ...] = (Attention, SlidingWindowAttention, FeedForward)
"""The kinds of layers that are made of vLLM's own."""


class ModelCheck(VerifyAndUpdateConfig):
    """Refuses, in the process of the caller, what would otherwise fail in a worker's."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        config = model_config.hf_config
        check(config)
        if SlidingWindowAttention not in config.layer_kinds:
            config.sliding_window = None  # vLLM would take it for every layer's


def check(config: AttnResConfig) -> None:
    """Raises UsageError for a config with layers of kinds that are not served."""
    missing = dict.fromkeys(kind for kind in config.layer_kinds if kind not in SERVED)
    if missing:
        # vLLM's Transformers backend has a place for keys and values, and for no other state
        elsewhere = any(kind.is_attention and not issubclass(kind, Attention) for kind in missing)
        mend = "serve it with: attnres serve" if elsewhere else "give --model-impl transformers"
        raise UsageError(
            f"AttnRes's own model in vLLM has no {' and no '.join(kind.word for kind in missing)} layers, which this "
            f"model has; {mend}"
        )
