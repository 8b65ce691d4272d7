"""Parameters and floating-point operations of a decoder, counted exactly."""

import torch
from torch import nn

from .config import DecoderConfig
from .decoder import Decoder
from .layers.experts import MixtureOfExperts
from .layers.gqa import Attention
from .layers.kda import KimiDeltaAttention
from .layers.latent import MultiHeadLatentAttention


def parameter_counts(config: DecoderConfig) -> dict[str, int]:
    """Exact counts of "total", "activated" (per token, without embeddings and head) and "embedding" parameters.

    Of the routed experts a token activates num_experts_per_tok.
    """
    with torch.device("meta"):
        decoder = Decoder(config)
    total = sum(p.numel() for p in decoder.parameters())
    ends = {id(p): p.numel() for p in (decoder.embed_tokens.weight, decoder.lm_head.weight)}
    embedding = sum(ends.values())
    experts = [layer for layer in decoder.layers if isinstance(layer, MixtureOfExperts)]
    idle = sum(_expert_parameters(m) * (m.num_experts - m.experts_per_token) // m.num_experts for m in experts)
    return {"total": total, "activated": total - embedding - idle, "embedding": embedding}


def training_flops_per_token(config: DecoderConfig, context: int) -> float:
    """Training operations per token: three times the forward pass. It counts
    every matrix that a token meets (2 operations a weight, the head included), what `layer_flops` counts beside them,
    and the residual connection's reads. Norms, rotary positions, activations and softmax are left out.
    """
    with torch.device("meta"):
        decoder = Decoder(config)
    layers = sum(layer_flops(layer, context) for layer in decoder.layers)
    reads = sum(decoder.residual.read_flops(layer) for layer in range(config.num_layers + 1))
    return 3 * (layers + 2 * decoder.lm_head.weight.numel() + reads)


def layer_flops(layer: nn.Module, context: int) -> float:
    """Forward operations per token of one layer in a context of that many tokens: 2 for every weight of a matrix or
    short convolution, and

    - grouped-query and latent attention (expanded): 2 for every channel of a key and of a value, over the mean of
      (context + 1) / 2 keys;
    - Kimi Delta Attention, per head of width E in chunks of C: three products with the E x E state (6 E^2), and within
      a chunk two with keys for the scores and three to apply them, over the mean of (C + 1) / 2 tokens (5 (C + 1) E);
    - experts: only those that a token is sent to.
    """
    flops = 2.0 * sum(module.weight.numel() for module in layer.modules() if isinstance(module, nn.Linear))
    keys = (context + 1) / 2
    if isinstance(layer, Attention):
        flops += 4 * keys * layer.o_proj.in_features
    elif isinstance(layer, MultiHeadLatentAttention):
        flops += 2 * keys * (layer.q_proj.out_features + layer.o_proj.in_features)
    elif isinstance(layer, KimiDeltaAttention):
        width, size = layer.o_proj.in_features, layer.head_dim
        flops += width * (6 * size + 5 * (layer.chunk_size + 1)) + 2 * 3 * width * layer.conv_size
    elif isinstance(layer, MixtureOfExperts):
        flops += 2.0 * _expert_parameters(layer) * layer.experts_per_token / layer.num_experts
    return flops


def _expert_parameters(layer: MixtureOfExperts) -> int:
    return sum(parameter.numel() for parameter in layer.parameters(recurse=False))
