"""transformers' attention functions (sdpa, eager, flash, flex, paged) behind the decoder's attention layers.

Shape suffixes as in `attnres.model.layers.gqa`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging

logger = logging.get_logger(__name__)


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
    """Attention [B, T, H, E] by the implementation that the config names; its weights [B, H, T, S] join `weights`."""
    name = layer.config._attn_implementation
    width = v_BKSE.shape[-1]
    if "flash" in name:
        v_BKSE = F.pad(v_BKSE, (0, q_BHTE.shape[-1] - width))  # such kernels want one width for keys and values
    function: Callable[..., tuple[Tensor, Tensor | None]] = ALL_ATTENTION_FUNCTIONS.get_interface(name, _eager)
    if hasattr(layer, "sliding_window"):
        kwargs["sliding_window"] = layer.sliding_window  # flash attention has no mask for it
    output, probabilities = function(
        layer, q_BHTE, k_BKSE, v_BKSE, mask, dropout=0.0, scaling=layer.head_dim**-0.5, **kwargs
    )
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
