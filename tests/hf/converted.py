"""Tiny random models of every architecture that can be converted, at the scale that trained ones have."""

import sys
from typing import Any

import pytest
import torch
import transformers

from attnres import hf

VOCAB, PAD = 61, 0
SHAPE = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "pad_token_id": PAD}
COMMON = {**SHAPE, "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 64}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
GROUPS = {"n_group": 1, "topk_group": 1, "n_shared_experts": 1, "n_routed_experts": 4, "first_k_dense_replace": 1}
WHOLE = {"num_local_experts": 4, "num_experts_per_tok": 2}
KINDS = {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
HEADS = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
NEXT = {"num_experts": 4, "head_dim": 8, "shared_expert_intermediate_size": 16}
KIMI = {"linear_num_heads": 2, "linear_head_dim": 8, "q_lora_rank": None, "num_key_value_heads": 4}


def neox(parallel: bool) -> dict[str, Any]:
    return {**SHAPE, "intermediate_size": 48, "max_position_embeddings": 64, "use_parallel_residual": parallel}


REQUIRED: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", COMMON),
    "mistral": ("Mistral", {**COMMON, "sliding_window": 5}),
    "qwen2": ("Qwen2", {**COMMON, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {**COMMON, "head_dim": 8}),
    "qwen3_moe": ("Qwen3Moe", {**COMMON, **EXPERTS, "num_experts": 4, "head_dim": 8, "mlp_only_layers": [1]}),
    "mixtral": ("Mixtral", {**COMMON, **WHOLE}),
    "phi3": ("Phi3", COMMON),
    "gemma2": ("Gemma2", {**COMMON, "head_dim": 8, "sliding_window": 5}),
    "gemma3": ("Gemma3", {**COMMON, "head_dim": 8, "sliding_window": 5}),
    "gpt2": ("GPT2", {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}),
    "olmo2": ("Olmo2", COMMON),
    "gpt_neox": ("GPTNeoX", neox(False)),
    "gpt_neox_parallel": ("GPTNeoX", neox(True)),
    "granite": ("Granite", {**COMMON, "residual_multiplier": 0.3, "embedding_multiplier": 2.0}),
    "kimi_linear": ("KimiLinear", {**COMMON, **EXPERTS, **WHOLE, **LATENT, **KINDS, **KIMI}),
}
FURTHER: dict[str, tuple[str, dict[str, Any]]] = {
    "cohere": ("Cohere", COMMON),
    "deepseek_v3": ("DeepseekV3", {**COMMON, **EXPERTS, **LATENT, **GROUPS, "num_key_value_heads": 4}),
    "deepseek_v2": ("DeepseekV2", {**COMMON, **EXPERTS, **LATENT, **GROUPS, "num_key_value_heads": 4}),
    "gemma": ("Gemma", {**COMMON, "head_dim": 8}),
    "glm4_moe": ("Glm4Moe", {**COMMON, **EXPERTS, **GROUPS, "head_dim": 8}),
    "gpt_oss": ("GptOss", {**COMMON, **WHOLE, "head_dim": 8, "sliding_window": 5}),
    "granitemoe": ("GraniteMoe", {**COMMON, **WHOLE, "residual_multiplier": 0.3}),
    "olmo": ("Olmo", COMMON),
    "olmo3": ("Olmo3", {**COMMON, "sliding_window": 5}),
    "olmoe": ("Olmoe", {**COMMON, "num_experts": 4, "num_experts_per_tok": 2}),
    "phi": ("Phi", COMMON),
    "qwen2_moe": ("Qwen2Moe", {**COMMON, **EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 16}),
    "qwen3_next": ("Qwen3Next", {**COMMON, **EXPERTS, **KINDS, **HEADS, **NEXT}),
    "seed_oss": ("SeedOss", {**COMMON, "head_dim": 8}),
    "smollm3": ("SmolLM3", COMMON),
    "starcoder2": ("Starcoder2", COMMON),
}
with pytest.MonkeyPatch.context() as patch:
    for package in ("fla", "causal_conv1d"):  # where these are installed, models call their kernels, on CPU tensors too
        patch.setitem(sys.modules, package, None)
    # which imports the models
    ALL = {name: row for name, row in (REQUIRED | FURTHER).items() if hasattr(transformers, f"{row[0]}PreTrainedModel")}
_CONFIGS = {"Gemma3": "Gemma3TextConfig"}
_MODELS = {"GPT2": "GPT2LMHeadModel"}


def build(name: str, dtype: torch.dtype = torch.float64, seed: int = 0, **changes: Any) -> Any:
    """A causal language model with weights of realistic scale, in evaluation mode."""
    family, values = ALL[name]
    config = getattr(transformers, _CONFIGS.get(family, f"{family}Config"))(**{**values, **changes})
    model = getattr(transformers, _MODELS.get(family, f"{family}ForCausalLM"))(config)
    if dtype == torch.float64 and "expert" in " ".join(dict(model.named_parameters())):
        model.set_experts_implementation("eager")  # the grouped kernel knows no double precision
    return randomise(model, seed).to(dtype).eval()


@torch.no_grad()
def randomise(model: Any, seed: int = 0) -> Any:
    """Matrices that keep the scale of what they read, norms and biases that are not all alike."""
    generator = torch.Generator().manual_seed(seed)

    def normal(shape: torch.Size) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    for name, parameter in model.named_parameters():
        if "embed" in name or "wte" in name or "wpe" in name:
            parameter.copy_(0.3 * normal(parameter.shape))
        elif parameter.dim() > 1:
            fan_in = parameter.shape[-2] if "c_" in name else parameter.shape[-1]
            parameter.copy_(normal(parameter.shape) / fan_in**0.5)
        else:
            parameter.copy_(parameter + 0.3 * normal(parameter.shape))
    return model


@torch.no_grad()
def move_queries(model: Any, seed: int = 1) -> Any:
    """Gives a converted model the queries and key norms of one that has been trained."""
    generator = torch.Generator().manual_seed(seed)
    residual = model.base_model.residual
    residual.pseudo_query.copy_(torch.randn(residual.pseudo_query.shape, generator=generator) / 4)
    residual.key_norm.copy_(1 + torch.randn(residual.key_norm.shape, generator=generator) / 4)
    return model


def with_moved_queries(
    name: str, residual: str = "block_attnres", dtype: torch.dtype = torch.float32, **changes: Any
) -> Any:
    """A "native" language model, or that of an architecture converted, as if it had been trained."""
    if name == "native":
        config = hf.AttnResConfig(**{**COMMON, **changes}, residual=residual)
        model = randomise(hf.AttnResForCausalLM(config)).to(dtype).eval()
    else:
        model = hf.convert(build(name, dtype, **changes), residual)
    return move_queries(model)


def tokens(batch: int = 2, length: int = 9, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCAB, (batch, length), generator=generator)


def padded(side: str, length: int = 9, padding: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and attention mask; the second row has padding on one side."""
    ids, mask = tokens(2, length), torch.ones(2, length, dtype=torch.long)
    where = slice(padding) if side == "left" else slice(-padding, None)
    ids[1, where], mask[1, where] = PAD, 0
    return ids, mask
