"""Packed sequences in converted hybrids: the borders on their way to linear attention, whose state no mask stops."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..packing import STATEFUL, find_packing

ENDS = "sequence_ends"
"""The argument of a converted decoder layer that says where sequences end, int [N + 1], if all rows follow one another;
None for rows of one sequence each."""

_OF_KERNELS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


def with_ends(config: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a base model's forward, for packed sequences those that keep them apart in every layer.

    Models without linear attention get them as they are: what softmax attention heeds is transformers' business.
    Raises UsageError for a packing that some layer or a cache could not heed.
    """
    if STATEFUL.isdisjoint(getattr(config, "layer_types", None) or ()):
        return arguments
    mask, positions = arguments.get("attention_mask"), arguments.get("position_ids")
    borders = arguments.get("cu_seq_lens_q")
    tokens = arguments.get("input_ids")
    tokens = arguments.get("inputs_embeds") if tokens is None else tokens
    if tokens is None or (positions is None and borders is None):
        return arguments
    padding = mask.get("linear_attention") if isinstance(mask, dict) else mask
    is_padding = isinstance(mask, Tensor) and mask.dim() == 2
    packing = find_packing(
        config,
        (tokens.shape[0], tokens.shape[1]),
        positions,
        borders,
        padding,
        with_cache=bool(arguments.get("use_cache")) or arguments.get("past_key_values") is not None,
        has_own_masks=mask is not None and not is_padding,
    )
    if packing is None:
        return arguments
    apart = {"use_cache": False, ENDS: packing.cu_seqlens}
    if is_padding:
        apart["attention_mask"] = None  # nothing is padding; transformers heeds positions only without a mask
    if positions is None or borders is not None:
        apart["position_ids"] = packing.positions
    return arguments | apart


def in_pieces(sublayer: Callable[..., Any], x: Tensor, ends: Tensor, arguments: dict[str, Any]) -> Tensor:
    """What linear attention makes of the sequences in x [B, T, D], each on its own."""
    arguments = {name: value for name, value in arguments.items() if name not in _OF_KERNELS}
    pieces = x.flatten(0, 1).unsqueeze(0).split(ends.diff().tolist(), 1)
    outputs = [sublayer(piece, **arguments) for piece in pieces]
    return torch.cat([o[0] if isinstance(o, tuple) else o for o in outputs], 1).view(x.shape)
