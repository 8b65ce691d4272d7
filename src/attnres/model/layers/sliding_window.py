"""Causal self-attention that looks back over the last `sliding_window` tokens, its own included.

Everything else is grouped-query attention with rotary positions (`gqa`, whose shape suffixes these are). Queries go in
slices of W = sliding_window, each with the at most 2 W - 1 keys that it may see, so that work and masks grow with the
tokens and not with their square. The decoder's cache keeps all keys and values; transformers' keeps the last W.
"""

import torch
from torch import Tensor

from ...errors import UsageError, check_counts
from ...ops.exporting import is_exporting
from ..config import DecoderConfig, DecoderShape
from .gqa import Attention, Context, sdpa


class SlidingWindowAttention(Attention):
    """One sliding-window attention layer, with its input norm."""

    word = "window attention"
    cache_type = "sliding_attention"

    def __init__(self, config: DecoderConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        assert config.sliding_window is not None
        self.sliding_window = config.sliding_window

    @classmethod
    def check(cls, config: DecoderShape) -> None:
        if config.sliding_window is None:
            raise UsageError(
                "sliding_window must be given for the sliding_window layers of attention_pattern: the tokens that they "
                "look back over, such as 512"
            )
        check_counts(2, sliding_window=config.sliding_window)

    def attend(self, q_BHTE: Tensor, k_BKSE: Tensor, v_BKSE: Tensor, context: Context) -> Tensor:
        if context.attend is not sdpa:  # which gets masks for windows
            return context.attend(self, q_BHTE, k_BKSE, v_BKSE, context.window_mask)
        if is_exporting():  # a program for any number of tokens has no number of slices
            return self._attend_slice(q_BHTE, k_BKSE, v_BKSE, context.mask)
        window, earlier, outputs = self.sliding_window, k_BKSE.shape[2] - q_BHTE.shape[2], []
        for first, queries in enumerate(q_BHTE.split(window, 2)):
            end = earlier + first * window + queries.shape[2]
            begin = max(0, earlier + (first - 1) * window + 1)
            mask = context.mask
            if mask is not None:
                mask = mask[first * window : first * window + queries.shape[2], begin:end]
            outputs.append(self._attend_slice(queries, k_BKSE[:, :, begin:end], v_BKSE[:, :, begin:end], mask))
        return torch.cat(outputs, 1)

    def _attend_slice(self, q_BHTE: Tensor, k_BKSE: Tensor, v_BKSE: Tensor, mask: Tensor | None) -> Tensor:
        position = torch.arange(k_BKSE.shape[2], device=q_BHTE.device)
        age = position[k_BKSE.shape[2] - q_BHTE.shape[2] :, None] - position
        seen = (age >= 0) & (age < self.sliding_window)
        return sdpa(self, q_BHTE, k_BKSE, v_BKSE, seen if mask is None else seen & mask)

    def flops(self, context: int) -> float:
        """As of grouped-query attention, over the keys that a token sees on average."""
        unseen = max(0, context - self.sliding_window)  # by the last token, one fewer by each before it
        mean = (context + 1) / 2 - unseen * (unseen + 1) / 2 / context
        return super().flops(context) + 4 * (mean - (context + 1) / 2) * self.o_proj.in_features

    @classmethod
    def kept(cls, config: DecoderShape) -> str:
        return f"{super().kept(config)}, seen for {config.sliding_window} tokens"

    @classmethod
    def paged(cls, config: DecoderShape) -> None:
        return None
