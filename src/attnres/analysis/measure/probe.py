"""What travels over depth in a model, measured on real batches by running the decoder's loop with the lid off."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...model import Decoder
from ...model.decoder import stream_dtype
from ...model.loop import input_norm, run
from ...residual import DepthAttention, Residual, State


def probe(model: Decoder, batches: Iterable[tuple[Tensor, Tensor]]) -> dict[str, Any]:
    """Means over the tokens of `batches` of (inputs, targets), token ids [B, T].

    Returns output_magnitude: per Transformer block the RMS of what it left for its readers (the stream, the partial sum
    of its depth block or the output itself); gradient_magnitude: the RMS of the loss gradient there, per token;
    depth_weights: per layer, the output read last, the mean softmax weight of each source; None for a mechanism that
    does not attend over depth. The model runs in evaluation mode, whatever its own, and is left as it was: dropout
    rolls no dice, and its experts do not count these tokens as a load.
    """
    device = model.embed_tokens.weight.device
    seen: list[list[Tensor]] = []
    tokens: list[int] = []
    with evaluating(model), layer_by_layer(model.residual):
        for inputs, targets in batches:
            seen.append(_watch(model, inputs.to(device), targets.to(device)))
            tokens.append(targets.numel())
    if not seen:
        raise ValueError("batches is empty; a probe needs at least one batch")
    share = torch.tensor(tokens) / sum(tokens)  # the last batch may have fewer rows
    outputs, gradients, *weights = (torch.tensordot(share, torch.stack(same), 1) for same in zip(*seen, strict=True))
    return {
        "output_magnitude": outputs.sqrt().tolist(),
        "gradient_magnitude": gradients.sqrt().tolist(),
        "depth_weights": [row.tolist() for row in weights] or None,
    }


def _watch(model: Decoder, inputs: Tensor, targets: Tensor) -> list[Tensor]:
    """Mean squares of the outputs and of their gradients, [Transformer blocks] each; then every read's mean weights."""
    residual = model.residual
    context = model.context(inputs.shape[1], inputs.device)
    weights: list[Tensor] = []
    outputs: list[Tensor] = []

    def look(state: State, layer: int) -> None:
        if layer and layer % 2 == 0:
            outputs.append(residual.latest(state))
        if isinstance(residual, DepthAttention):
            with torch.no_grad():
                weights.append(residual.depth_weights(state, layer).flatten(1).float().mean(1).cpu())

    def call(layer: nn.Module, x: Tensor) -> Tensor:
        return layer(x, context)

    with torch.enable_grad():
        state, depth = residual.start(stream_dtype(model.embed_tokens(inputs))), model.config.num_layers
        state = run(residual, model.layers, state, 0, depth, call=call, norm=input_norm, observe=look)
        look(state, depth)
        logits = model.lm_head(residual.finish(state, model.norm))
        # the sum, so that a token's gradient does not depend on how many others share the batch
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum")
        gradients = torch.autograd.grad(loss, outputs)
    return [_mean_squares(outputs), _mean_squares(gradients), *weights]


def _mean_squares(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([tensor.detach().float().square().mean() for tensor in tensors]).cpu()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within, the model and all its modules are in evaluation mode; afterwards each is in its own again."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def layer_by_layer(residual: Residual) -> Iterator[None]:
    """States within hold each output as one tensor that later reads really use, and so has a gradient."""
    settings = {"lean": True} | ({"schedule": "layerwise"} if isinstance(residual, DepthAttention) else {})
    before = {name: getattr(residual, name) for name in settings}
    try:
        for name, value in settings.items():
            setattr(residual, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(residual, name, value)
