"""Parameters and floating-point operations of a decoder, counted exactly."""

import torch

from .config import DecoderConfig
from .decoder import Decoder


def parameter_counts(config: DecoderConfig) -> dict[str, int]:
    """Exact counts of "total", "activated" (per token, without embeddings and head) and "embedding" parameters."""
    with torch.device("meta"):
        decoder = Decoder(config)
    total = sum(p.numel() for p in decoder.parameters())
    ends = {id(p): p.numel() for p in (decoder.embed_tokens.weight, decoder.lm_head.weight)}
    embedding = sum(ends.values())
    return {"total": total, "activated": total - embedding, "embedding": embedding}


def training_flops_per_token(config: DecoderConfig, context: int) -> float:
    """Training operations per token: three times the forward pass. It counts
    every matrix (2 operations a weight, the head included), causal attention over the mean of (context + 1) / 2 keys
    (4 operations a key and channel) and the residual connection's reads. Norms, rotary positions, activations and
    softmax are left out.
    """
    with torch.device("meta"):
        decoder = Decoder(config)
    matrices = sum(module.weight.numel() for module in decoder.modules() if isinstance(module, torch.nn.Linear))
    assert config.head_dim is not None
    keys = (context + 1) / 2
    attention = 4 * keys * config.num_attention_heads * config.head_dim * config.num_hidden_layers
    reads = sum(decoder.residual.read_flops(layer) for layer in range(config.num_layers + 1))
    return 3 * (2 * matrices + attention + reads)
