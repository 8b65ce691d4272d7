"""transformers' attention functions (sdpa, eager, flash, flex, paged) behind the decoder's attention layers.

Shape suffixes as in `attnres.model.layers.gqa`.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging

logger = logging.get_logger(__name__)


class AttentionInterface(nn.Module):
    """The way of one attention layer to the function that the config names, with what such functions ask of a layer.

    A module of its own, because vLLM takes for an attention layer what calls, in the source of its `forward` and once,
    a local variable from `ALL_ATTENTION_FUNCTIONS`, with an attribute as scale; and it puts its own cache there.
    """

    is_causal = True

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.config = layer.config
        self.layer_idx = layer.layer_idx
        self.num_key_value_groups = layer.num_key_value_groups
        self.scaling = layer.head_dim**-0.5
        self.sliding_window = getattr(layer, "sliding_window", None)

    def forward(
        self, q_BHTE: Tensor, k_BKSE: Tensor, v_BKSE: Tensor, mask: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Attention, [B, T, H, E] or with all heads of a token in one row, and its weights [B, H, T, S] or None."""
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, _eager)
        # flash attention has no mask for a window
        window = {} if self.sliding_window is None else {"sliding_window": self.sliding_window}
        return attend(  # type: ignore[no-any-return]
            self, q_BHTE, k_BKSE, v_BKSE, mask, dropout=0.0, scaling=self.scaling, **window, **kwargs
        )


def attend_by_config(
    layer: Any,
    q_BHTE: Tensor,
    k_BKSE: Tensor,
    v_BKSE: Tensor,
    mask: Any,
    *,
    weights: list[Tensor] | None,
    **kwargs: Any,
) -> Tensor:
    """Attention [B, T, H, E] by a layer's interface; its weights [B, H, T, S] join `weights`."""
    name = layer.config._attn_implementation
    width = v_BKSE.shape[-1]
    if "flash" in name:
        v_BKSE = F.pad(v_BKSE, (0, q_BHTE.shape[-1] - width))  # such kernels want one width for keys and values
    output, probabilities = layer.interface(q_BHTE, k_BKSE, v_BKSE, mask, **kwargs)
    if weights is not None:
        if probabilities is None:
            logger.warning_once(f"output_attentions needs attn_implementation='eager'; {name!r} gives no weights")
        else:
            weights.append(probabilities)
    # inference engines answer with all heads of a token in one row
    return output.reshape(*q_BHTE.transpose(1, 2).shape[:3], -1)[..., :width]


def _eager(
    layer: Any, q_BHTE: Tensor, k_BKSE: Tensor, v_BKSE: Tensor, mask: Tensor | None, scaling: float, **_: Any
) -> tuple[Tensor, Tensor]:
    k_BHSE, v_BHSE = (x.repeat_interleave(layer.num_key_value_groups, 1) for x in (k_BKSE, v_BKSE))
    logits_BHTS = scaling * q_BHTE @ k_BHSE.transpose(2, 3)
    if mask is not None:
        logits_BHTS = logits_BHTS + mask
    weights_BHTS = F.softmax(logits_BHTS, -1, dtype=torch.promote_types(q_BHTE.dtype, torch.float32)).to(q_BHTE.dtype)
    return (weights_BHTS @ v_BHSE).transpose(1, 2), weights_BHTS
