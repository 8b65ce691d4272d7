"""Small models that Kimi K3's architecture can express, with every weight away from its start."""

import torch

from attnres.hf import AttnResConfig, AttnResForCausalLM

SHAPE = dict(
    vocab_size=512, hidden_size=128, num_attention_heads=4, head_dim=32, kv_lora_rank=64, qk_nope_head_dim=32,
    qk_rope_head_dim=16, v_head_dim=32, intermediate_size=352, num_hidden_layers=8, max_position_embeddings=512,
    attention_pattern=["kda", "kda", "kda", "mla"], initializer_range=0.06, tie_word_embeddings=False,
    residual="block_attnres", residual_options={"block_size": 4, "stream_scale": False},
)  # fmt: skip
EXPERTS = dict(
    num_experts=8, num_experts_per_tok=2, num_shared_experts=1, moe_intermediate_size=96, first_k_dense_replace=1,
    routed_scaling_factor=2.446,
)  # fmt: skip
KIMI_K3 = dict(
    hidden_act="situ", linear_gate_lower_bound=-5.0, linear_full_rank_gate=True, q_lora_rank=48,
    mla_use_output_gate=True, routed_expert_hidden_size=64, latent_moe_use_norm=True,
)  # fmt: skip
MODELS = {
    "dense": {},
    "tied": {"tie_word_embeddings": True, "residual_options": {"block_size": 6, "stream_scale": False}},
    "experts": EXPERTS,
    "kimi_k3": EXPERTS | KIMI_K3,
    "scaled": {"residual_options": {"block_size": 4}},
}


def model(name="dense", seed=0, **changes):
    """A model of `MODELS`, in evaluation mode."""
    torch.manual_seed(seed)
    made = AttnResForCausalLM(AttnResConfig(**{**SHAPE, **MODELS[name], **changes})).eval()
    with torch.no_grad():
        for path, parameter in made.named_parameters():
            if (parameter.dim() == 1 and "norm" in path) or path.endswith("key_norm"):
                parameter.copy_(1 + 0.2 * torch.randn(parameter.shape))
            if path.endswith("pseudo_query"):
                parameter.copy_(1.2 * parameter.shape[-1] ** -0.5 * torch.randn(parameter.shape))
        for path, buffer in made.named_buffers():
            if path.endswith("correction_bias"):
                buffer.copy_(0.05 * torch.randn(buffer.shape))
    return made
