"""Sampling from a decoder, one token at a time, with what layers need of earlier tokens kept."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..errors import Failure, UsageError
from .cache import KeyValueCache
from .decoder import Decoder
from .layers.gqa import lengths_vary


@torch.inference_mode()
def generate(
    model: Decoder,
    prompt: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 0.8,
    top_k: int | None = None,
    seed: int = 0,
    end: int | None = None,
    prefill_chunk: int | None = None,
) -> Iterator[int]:
    """Yields token ids that continue the prompt [T].

    temperature 0 takes the likeliest token; top_k draws from that many likeliest ones; `end` is the id that ends the
    text. prefill_chunk: read the prompt so many tokens at a time, so that a residual connection's state has at most
    that length (the sources of depth attention: N x prefill_chunk x D); the default reads it at once.

    Raises UsageError for an empty prompt, one that leaves no room in the model's context, or settings out of range;
    Failure where the logits are not finite.
    """
    check_sampling(
        prompt, max_new_tokens, model.config.max_position_embeddings, temperature, top_k, seed, prefill_chunk
    )
    generator = torch.Generator(prompt.device).manual_seed(seed)
    cache = KeyValueCache()
    *earlier, tokens = prompt[None].split(min(prefill_chunk or len(prompt), len(prompt)), 1)
    for chunk in earlier:
        model(chunk, cache, logits_to_keep=1)
    for _ in range(max_new_tokens):
        with lengths_vary():
            logits = model(tokens, cache, logits_to_keep=1)[0, -1].float()
        if not logits.isfinite().all():
            raise Failure(
                "the model's output is not finite; its weights or buffers are not, or overflow: use another checkpoint"
            )
        if temperature < torch.finfo(logits.dtype).tiny:
            token = int(logits.argmax())
        else:
            likeliest, ids = logits.topk(min(top_k or len(logits), len(logits)))
            # measured from the likeliest, for a small temperature would overflow
            chances = ((likeliest - likeliest[0]) / temperature).softmax(-1)
            token = int(ids[torch.multinomial(chances, 1, generator=generator)])
        if token == end:
            return
        yield token
        tokens = prompt.new_full((1, 1), token)


def check_sampling(
    prompt: Tensor,
    max_new_tokens: int,
    longest: int,
    temperature: float,
    top_k: int | None,
    seed: int,
    prefill_chunk: int | None,
) -> None:
    """Raises UsageError for settings of `generate` that do not work in a context of `longest` tokens."""
    if prompt.dim() != 1:
        raise UsageError(f"prompt must be token ids of shape [tokens]; it is {list(prompt.shape)}")
    if len(prompt) == 0:
        raise UsageError("prompt is empty; give at least one token")
    if not (0 <= temperature < math.inf) or (top_k is not None and top_k < 1) or max_new_tokens < 1:
        raise UsageError(
            "temperature must be zero or more, top_k and the number of new tokens positive; "
            f"they are {temperature}, {top_k} and {max_new_tokens}"
        )
    if temperature == 0 and (top_k or 1) > 1:
        raise UsageError(
            f"temperature 0 takes the likeliest token and leaves nothing for top_k, which is {top_k}; leave one of "
            "them out"
        )
    if not -(2**63) <= seed < 2**63:
        raise UsageError(f"seed must fit 64 bits; it is {seed}")
    if prefill_chunk is not None and prefill_chunk < 1:
        raise UsageError(f"prefill_chunk must be a positive number of tokens, or None; it is {prefill_chunk}")
    if len(prompt) + max_new_tokens > longest:
        raise UsageError(
            f"prompt and new tokens must fit the model's context of {longest} tokens; they are {len(prompt)} and "
            f"{max_new_tokens}: shorten the prompt or ask for fewer tokens"
        )
