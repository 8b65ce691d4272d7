"""Where a model first leaves the finite numbers."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from ..model import Decoder


@torch.no_grad()
def first_non_finite(model: Decoder, input_ids: Tensor, context: AbstractContextManager[Any]) -> str:
    """Runs the batch again and names the first weight, or else the first layer output, that is not finite."""
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            return f"the weight {name} is not finite"
    found: list[str] = []

    def watch(name: str) -> Any:
        def hook(module: Any, args: Any, output: Tensor) -> None:
            if not found and not output.isfinite().all():
                found.append(name)

        return hook

    watched = {"the embedding": model.embed_tokens, "the output head": model.lm_head}
    for i, layer in enumerate(model.layers):
        watched[f"layer {i} ({'attention' if i % 2 == 0 else 'MLP'} of Transformer block {i // 2})"] = layer
    handles = [module.register_forward_hook(watch(name)) for name, module in watched.items()]
    try:
        with context:
            model(input_ids)
    finally:
        for handle in handles:
            handle.remove()
    if found:
        return f"the output of {found[0]} went non-finite first"
    return "every layer's output is finite, so it arose in the loss or in the backward pass"
