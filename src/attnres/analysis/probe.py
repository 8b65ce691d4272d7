"""What travels over depth in a model, measured on real batches by running the decoder's loop with the lid off."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..model import Decoder
from ..model.decoder import stream_dtype
from ..residual import DepthAttention


def probe(model: Decoder, batches: Iterable[tuple[Tensor, Tensor]]) -> dict[str, Any]:
    """Means over the tokens of `batches` of (inputs, targets), token ids [B, T].

    Returns output_magnitude: per Transformer block the RMS of what it left for its readers (the stream, the partial sum
    of its depth block or the output itself); gradient_magnitude: the RMS of the loss gradient there, per token;
    depth_weights: per layer, the output read last, the mean softmax weight of each source; None for a mechanism that
    does not attend over depth.
    """
    magnitudes, gradients, weights, count = [], [], [], 0
    device = model.embed_tokens.weight.device
    was_lean, model.residual.lean = model.residual.lean, True  # a lean write leaves one tensor to watch
    try:
        for inputs, targets in batches:
            seen = _watch(model, inputs.to(device), targets.to(device))
            magnitudes.append(seen[0])
            gradients.append(seen[1])
            weights.append(seen[2])
            count += 1
    finally:
        model.residual.lean = was_lean
    if count == 0:
        raise ValueError("batches is empty; a probe needs at least one batch")
    mean_square = lambda rows: torch.stack(rows).square().mean(0).sqrt().tolist()  # noqa: E731
    return {
        "output_magnitude": mean_square(magnitudes),
        "gradient_magnitude": mean_square(gradients),
        "depth_weights": _mean_rows(weights) if weights[0] is not None else None,
    }


def _watch(model: Decoder, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, list[Tensor] | None]:
    residual = model.residual
    context = model.context(inputs.shape[1], inputs.device)
    attends = isinstance(residual, DepthAttention)
    rows: list[Tensor] = []
    outputs: list[Tensor] = []
    with torch.enable_grad():
        state = residual.start(stream_dtype(model.embed_tokens(inputs)))
        for i, layer in enumerate(model.layers):
            if isinstance(residual, DepthAttention):
                rows.append(_token_mean(residual.depth_weights(state, i)))
            x, state = residual.read(state, i, layer.norm)  # type: ignore[arg-type]
            state = residual.write(state, i, layer(x, context))
            if i % 2:
                outputs.append(residual.latest(state))
        if isinstance(residual, DepthAttention):
            rows.append(_token_mean(residual.depth_weights(state, model.config.num_layers)))
        logits = model.lm_head(residual.finish(state, model.norm))
        # the sum, so that a token's gradient does not depend on how many others share the batch
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum")
        slopes = torch.autograd.grad(loss, outputs)
    rms = [torch.stack([t.detach().float().square().mean().sqrt() for t in ts]).cpu() for ts in (outputs, slopes)]
    return rms[0], rms[1], rows if attends else None


def _token_mean(weights: Tensor) -> Tensor:
    return weights.detach().flatten(1).float().mean(1).cpu()


def _mean_rows(batches: list[Any]) -> list[list[float]]:
    return [torch.stack(same_row).mean(0).tolist() for same_row in zip(*batches, strict=True)]
