"""Perplexity of a text file under a causal language model."""

import math
import sys
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from .. import text_file
from ..errors import Failure, UsageError

LONGEST_DEFAULT_CONTEXT = 2048


@torch.no_grad()
def perplexity(
    model: Any,
    tokenizer: Any,
    data: str | Path,
    *,
    context: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
) -> dict[str, Any]:
    """How well a model predicts a text file, token by token, in overlapping windows.

    Every token is scored once. The file, which must be UTF-8, is read behind the tokenizer's beginning- or
    end-of-document token, if it has one; else the tokens of its first character are given and not scored.

    Args:
        context: tokens in a window; the default is the model's longest context, at most 2048.
        stride: tokens by which windows advance, at most context; a token that is scored in the second window or later
            has at least context - stride tokens in front of it. The default is half the context.
        batch_size: windows computed at once.

    Returns {"file", "tokens" scored, "bytes" they spell, "loss" in nats per token, "perplexity" per token,
    "bits_per_byte" (comparable between tokenizers), "context", "stride"}.
    """
    text = read_text(data)
    longest = getattr(model.config, "max_position_embeddings", None) or LONGEST_DEFAULT_CONTEXT
    context = min(longest, LONGEST_DEFAULT_CONTEXT) if context is None else context
    stride = max(context // 2, 1) if stride is None else stride
    if not 1 <= context <= longest:
        raise UsageError(f"context must be from 1 to the model's {longest} tokens; it is {context}")
    if not 1 <= stride <= context:
        raise UsageError(f"stride must be from 1 to context, {context}; it is {stride}")
    if batch_size < 1:
        raise UsageError(f"batch_size must be at least 1; it is {batch_size}")
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        ids, given, unscored = _first_character_given(tokenizer, text)
    else:
        ids = [start, *tokenizer(text, add_special_tokens=False, verbose=False).input_ids]
        given, unscored = 1, ""
    tokens = torch.tensor(ids, device=model.device)
    scored, size = len(tokens) - given, len(text.encode()) - len(unscored.encode())
    if scored < 1 or size < 1:
        raise UsageError(f"{data} has no token to predict; give a longer text")
    targets = len(tokens) - 1
    length = min(context, targets)
    begins = [*range(0, targets - length, stride), targets - length]
    total, reached = 0.0, given - 1
    for at in range(0, len(begins), batch_size):
        now = begins[at : at + batch_size]
        windows = tokens.unfold(0, length + 1, 1)[now]
        logits = model(windows[:, :-1], use_cache=False).logits
        for begin, row, wanted in zip(now, logits, windows[:, 1:], strict=True):
            fresh = reached - begin
            total += F.cross_entropy(row[fresh:].float(), wanted[fresh:], reduction="sum").item()
            reached = max(reached, begin + length)
    loss = total / scored
    if not math.isfinite(loss):
        raise Failure(f"the loss on {data} is {loss}; use a wider dtype, or check the model's weights")
    return {
        "file": str(data),
        "tokens": scored,
        "bytes": size,
        "loss": loss,
        "perplexity": math.exp(loss) if loss < math.log(sys.float_info.max) else math.inf,
        "bits_per_byte": total / math.log(2) / size,
        "context": context,
        "stride": stride,
    }


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file. Raises UsageError if there is none."""
    text = text_file.read_text(path, "data")
    if not text:
        raise UsageError(f"data {path} is empty; give a text file with text")
    return text


def _first_character_given(tokenizer: Any, text: str) -> tuple[list[int], int, str]:
    """(ids of the text, how many of them are needed to begin with a whole character, the text that those spell).

    A token of a byte-level vocabulary may end inside a character, and then it spells no text that could be counted.
    """
    if not tokenizer.is_fast:
        raise UsageError("the tokenizer has no token to begin with and cannot tell where tokens end; add an eos_token")
    encoded = tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=True)
    ids, spans = encoded.input_ids, encoded.offset_mapping
    given = next((i for i in range(1, len(ids)) if spans[i][0] >= spans[i - 1][1]), len(ids))
    return ids, given, text[: spans[given - 1][1]] if ids else ""
