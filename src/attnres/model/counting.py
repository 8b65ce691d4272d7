"""Parameters and floating-point operations of a decoder, counted exactly."""

import torch

from .config import DecoderConfig
from .decoder import Decoder
from .layer import layers_of


def parameter_counts(config: DecoderConfig) -> dict[str, int]:
    """Exact counts of "total", "activated" (per token, without embeddings and head) and "embedding" parameters.

    Of the routed experts a token activates num_experts_per_tok.
    """
    with torch.device("meta"):
        decoder = Decoder(config)
    total = sum(p.numel() for p in decoder.parameters())
    ends = {id(p): p.numel() for p in (decoder.embed_tokens.weight, decoder.lm_head.weight)}
    embedding = sum(ends.values())
    idle = sum(layer.idle_parameters() for layer in layers_of(decoder))
    return {"total": total, "activated": total - embedding - idle, "embedding": embedding}


def training_flops_per_token(config: DecoderConfig, context: int) -> float:
    """Training operations per token: three times the forward pass. It counts
    every matrix that a token meets (2 operations a weight, the head included), what `Layer.flops` counts beside them,
    and the residual connection's reads. Norms, rotary positions, activations and softmax are left out.
    """
    with torch.device("meta"):
        decoder = Decoder(config)
    layers = sum(layer.flops(context) for layer in layers_of(decoder))
    reads = sum(decoder.residual.read_flops(layer) for layer in range(config.num_layers + 1))
    return 3 * (layers + 2 * decoder.lm_head.weight.numel() + reads)
