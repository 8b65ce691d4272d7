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
    missing = dict.fromkeys(kind.word for kind in config.layer_kinds if kind not in SERVED)
    if missing:
        raise UsageError(
            f"AttnRes in vLLM has no layers of {' and '.join(missing)}, only dense MLPs and attention of the kinds gqa "
            "and sliding_window; serve this model with `attnres serve`"
        )
