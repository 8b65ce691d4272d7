"""The named shapes."""

from typing import Any

from ..errors import UsageError
from .config import DecoderConfig

# Three Kimi Delta Attention layers to one of latent attention, every one followed by 8 + 1 experts (paper section 7).
_KIMI_LINEAR: dict[str, Any] = {
    "vocab_size": 163840,
    "attention_pattern": ("kda", "kda", "kda", "mla"),
    "head_dim": 128,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "linear_head_dim": 128,
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "num_shared_experts": 1,
    "routed_scaling_factor": 2.446,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}


def _scaling(blocks: int, width: int, expert_width: int) -> dict[str, Any]:
    """A row of the paper's scaling table, which has as many heads as Transformer blocks."""
    return {
        **_KIMI_LINEAR,
        "hidden_size": width,
        "num_hidden_layers": blocks,
        "num_attention_heads": blocks,
        "moe_intermediate_size": expert_width,
        "max_position_embeddings": 8192,
    }


_PRESETS: dict[str, dict[str, Any]] = {
    # the default of `attnres compare`: minutes on two CPU cores
    "tiny": {
        "hidden_size": 128,
        "num_hidden_layers": 12,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "initializer_range": 0.06,
    },
    "small": {
        "hidden_size": 512,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "initializer_range": 0.03,
    },
    "medium": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "num_key_value_heads": 4},
    # the large ones' architecture, for tests and first steps on a CPU
    "kimi-linear-tiny": {
        **_KIMI_LINEAR,
        "vocab_size": 257,
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "head_dim": 32,
        "kv_lora_rank": 64,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 16,
        "v_head_dim": 32,
        "linear_head_dim": 32,
        "linear_chunk_size": 32,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "first_k_dense_replace": 1,
        "max_position_embeddings": 512,
        "initializer_range": 0.09,
    },
    "attnres-194m": _scaling(12, 896, 400),
    "attnres-241m": _scaling(13, 960, 432),
    "attnres-296m": _scaling(14, 1024, 464),
    "attnres-436m": _scaling(16, 1168, 528),
    "attnres-528m": _scaling(17, 1264, 560),
    "kimi-linear-48b-a3b": {
        **_KIMI_LINEAR,
        "hidden_size": 2304,
        "num_hidden_layers": 27,
        "num_attention_heads": 32,
        # full attention in the blocks 4, 8 .. 24 counted from 1, and in the last
        "attention_pattern": ("kda", "kda", "kda", "mla") * 6 + ("kda", "kda", "mla"),
        "intermediate_size": 9216,
        "moe_intermediate_size": 1024,
        "first_k_dense_replace": 1,
        "max_position_embeddings": 32768,
        "residual_options": {"block_size": 6},
    },
    # Kimi K3's architecture in the sizes of the published Kimi-K3-0.40B; docs/architectures.md says which are ours
    "kimi-k3-tiny": {
        "vocab_size": 163840,
        "hidden_size": 1024,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "attention_pattern": ("kda", "kda", "kda", "mla"),
        "head_dim": 64,
        "q_lora_rank": 256,
        "kv_lora_rank": 128,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 32,
        "v_head_dim": 64,
        "mla_use_output_gate": True,
        "linear_head_dim": 32,
        "linear_gate_lower_bound": -5.0,
        "linear_full_rank_gate": True,
        "hidden_act": "situ",
        "intermediate_size": 4096,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "num_shared_experts": 2,
        "moe_intermediate_size": 256,
        "routed_expert_hidden_size": 512,
        "latent_moe_use_norm": True,
        "first_k_dense_replace": 1,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "residual_options": {"block_size": 8},  # four decoder layers, each with two layers
    },
}


def presets() -> list[str]:
    """The names that `preset` knows."""
    return list(_PRESETS)


def preset(name: str) -> DecoderConfig:
    """A named shape. Raises UsageError for an unknown name."""
    if name not in _PRESETS:
        raise UsageError(f"preset {name!r} is unknown; known: {', '.join(_PRESETS)}")
    return DecoderConfig(**_PRESETS[name])
