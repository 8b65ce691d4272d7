"""The two layers of a Transformer block, by what the config says of it."""

from collections.abc import Callable

from torch import nn

from .config import DecoderConfig
from .layers.experts import MixtureOfExperts
from .layers.feed_forward import FeedForward
from .layers.gqa import Attention
from .layers.kda import KimiDeltaAttention
from .layers.latent import MultiHeadLatentAttention

ATTENTION_LAYERS = (Attention, MultiHeadLatentAttention, KimiDeltaAttention)


def attention_layer(config: DecoderConfig, block: int) -> nn.Module:
    """The attention layer of a Transformer block, counted from 0."""
    return _ATTENTION[config.attention_kinds[block]](config, block)


def feed_forward_layer(config: DecoderConfig, block: int) -> nn.Module:
    """The MLP of a Transformer block, counted from 0: dense, or a mixture of experts."""
    return _experts(config) if config.has_experts(block) else FeedForward(config)


def _delta_attention(config: DecoderConfig, block: int) -> nn.Module:
    assert config.linear_num_heads is not None and config.linear_head_dim is not None
    return KimiDeltaAttention(
        hidden_size=config.hidden_size,
        num_heads=config.linear_num_heads,
        head_dim=config.linear_head_dim,
        conv_size=config.linear_conv_kernel_dim,
        layer_idx=block,
        norm_eps=config.rms_norm_eps,
        chunk_size=config.linear_chunk_size,
    )


def _experts(config: DecoderConfig) -> nn.Module:
    assert config.moe_intermediate_size is not None
    return MixtureOfExperts(
        hidden_size=config.hidden_size,
        intermediate_size=config.moe_intermediate_size,
        num_experts=config.num_experts,
        experts_per_token=config.num_experts_per_tok,
        num_shared_experts=config.num_shared_experts,
        scaling=config.routed_scaling_factor,
        norm_eps=config.rms_norm_eps,
    )


_ATTENTION: dict[str, Callable[[DecoderConfig, int], nn.Module]] = {
    "gqa": Attention,
    "mla": MultiHeadLatentAttention,
    "kda": _delta_attention,
}
