"""Where a model first leaves the finite numbers."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from ..model import Decoder


@torch.no_grad()
def first_non_finite(model: Decoder, input_ids: Tensor, context: AbstractContextManager[Any]) -> str:
    """Runs the batch again and names the first layer whose output is not finite, and a tensor that is not."""
    found: list[str] = []

    def watch(name: str) -> Any:
        def hook(module: Any, args: Any, output: Tensor) -> None:
            if not found and not output.isfinite().all():
                found.append(name)

        return hook

    watched = {"the embedding": model.embed_tokens, "the output head": model.lm_head}
    watched |= {_layer(i): layer for i, layer in enumerate(model.layers)}
    handles = [module.register_forward_hook(watch(name)) for name, module in watched.items()]
    try:
        with context:
            model(input_ids)
    finally:
        for handle in handles:
            handle.remove()
    where = f"the output of {found[0]} went non-finite first" if found else "every layer's output is finite"
    wrong = non_finite_tensor(model)
    return f"{where}; {wrong} is not finite" if wrong else where


def non_finite_tensor(model: nn.Module) -> str | None:
    """ "the weight NAME" or "the buffer NAME", the first of what a checkpoint saves that is not finite."""
    saved = model.state_dict().keys()
    tensors: list[tuple[str, str, Tensor]] = [("weight", *pair) for pair in model.named_parameters()]
    tensors += [("buffer", *pair) for pair in model.named_buffers() if pair[0] in saved]
    return next((f"the {kind} {name}" for kind, name, tensor in tensors if not tensor.isfinite().all()), None)


def first_non_finite_gradient(model: Decoder) -> str:
    """Names the last layer with a gradient that is not finite: the backward pass runs from the last to the first."""
    wrong = [n for n, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
    if not wrong:
        return "every gradient is finite but their norm overflows"
    layers = [name for name in wrong if name.startswith("layers.")]
    after = [name for name in wrong if name.startswith(("norm.", "lm_head."))]
    if after or not layers:
        return f"the gradient of {(after or wrong)[-1]} went non-finite first"
    last = max(int(name.split(".")[1]) for name in layers)
    name = next(name for name in layers if name.startswith(f"layers.{last}."))
    return f"the gradient of {_layer(last)} went non-finite first, in its weight {name}"


def _layer(index: int) -> str:
    return f"layer {index} ({'attention' if index % 2 == 0 else 'MLP'} of Transformer block {index // 2})"
