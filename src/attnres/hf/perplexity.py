"""Perplexity of a text file under a causal language model."""

import math
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

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

    Every token is scored once. The file is read as UTF-8 behind the tokenizer's beginning- or end-of-document token, if
    it has one; else its first token is given and not scored.

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
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    given = "" if start is not None else tokenizer.decode(ids[:1])
    tokens = torch.tensor([start, *ids] if start is not None else ids, device=model.device)
    scored = len(tokens) - 1
    if scored < 1:
        raise UsageError(f"{data} has no token to predict; give a longer text")
    length = min(context, scored)
    begins = [*range(0, scored - length, stride), scored - length]
    total, reached = 0.0, 0
    for at in range(0, len(begins), batch_size):
        now = begins[at : at + batch_size]
        windows = tokens.unfold(0, length + 1, 1)[now]
        logits = model(windows[:, :-1], use_cache=False).logits
        for begin, row, targets in zip(now, logits, windows[:, 1:], strict=True):
            fresh = reached - begin
            total += F.cross_entropy(row[fresh:].float(), targets[fresh:], reduction="sum").item()
            reached = begin + length
    loss = total / scored
    if not math.isfinite(loss):
        raise Failure(f"the loss on {data} is {loss}; use a wider dtype, or check the model's weights")
    size = len(text.encode()) - len(given.encode())
    return {
        "file": str(data),
        "tokens": scored,
        "bytes": size,
        "loss": loss,
        "perplexity": math.exp(loss),
        "bits_per_byte": total / math.log(2) / size,
        "context": context,
        "stride": stride,
    }


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file; bytes that are not UTF-8 become U+FFFD. Raises UsageError if there is none."""
    try:
        text = Path(path).read_bytes().decode("utf-8", errors="replace")
    except OSError as error:
        raise UsageError(f"data {path} cannot be read: {error.strerror or error}; give a text file") from error
    if not text:
        raise UsageError(f"data {path} is empty; give a text file with text")
    return text
