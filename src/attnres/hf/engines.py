"""What vLLM's Transformers backend, which builds our models in its workers, would otherwise get wrong.

It is known by the name of its attention function, which it writes into a config before it builds the model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import UsageError

if TYPE_CHECKING:
    from .configuration import AttnResConfig

VLLM = "vllm"


class StaysWhole:
    """Comes before PreTrainedModel in a model's bases: refuses pipelines whose stages hand on hidden states alone."""

    config: Any

    @property
    def supports_pp_plan(self) -> bool:
        """False. vLLM asks before it splits a model, which it then does without a plan: there it raises UsageError."""
        if self.config.get_text_config()._attn_implementation == VLLM:
            raise UsageError(
                "pipeline_parallel_size must be 1: stages would have to hand on the whole state of the residual "
                "connection, and vLLM's hand on hidden states; use tensor_parallel_size"
            )
        return False


def adapt_to_vllm(config: AttnResConfig) -> None:
    """Gives the config of a native model that vLLM builds its plan by names, which splits all but routed experts.

    Does nothing elsewhere. Raises UsageError if vLLM's cache has no place for what some layers keep.
    """
    if config._attn_implementation != VLLM:
        return
    from ..model.layers.gqa import Attention  # which converted models do without

    for name, kind in zip(config.attention_kinds, config.layer_kinds[::2], strict=True):
        if not issubclass(kind, Attention):
            raise UsageError(
                f"vLLM's Transformers backend keeps keys and values alone, and the {name} layers of this model need "
                "something else; serve it with: attnres serve"
            )
    config.base_model_tp_plan = type(config).base_model_tp_plan  # type: ignore[misc]
