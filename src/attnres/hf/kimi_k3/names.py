"""The tensors of Kimi K3's text model: as its checkpoints name them, as this package does, and as llama.cpp does.

One of their layers is two of ours: layer i has an attention, our layer 2 i, and an MLP, our layer 2 i + 1. Sources:
llama.cpp's `conversion/kimi_k3.py`, `src/models/kimi-k3.cpp` and `gguf-py/gguf/tensor_mapping.py`.
"""

from typing import NamedTuple


class Name(NamedTuple):
    """One tensor.

    theirs: behind "layers.{i}." in a checkpoint, with "{expert}" where every expert has one. ours: its path in our
    layer. gguf: behind "blk.{i}." in llama.cpp's files, where several are made of it with spaces between. form: what
    lies between them, as one of `FORMS`.
    """

    theirs: str
    ours: str
    gguf: str
    form: str = "same"


FORMS = ("same", "conv", "decay", "latent", "experts")
"""same: as it is. conv: ours [N, W], theirs [N, 1, W], llama.cpp's [1, N, 1, W]. decay: theirs and ours A_log [H],
llama.cpp's -exp(A_log). latent: theirs and ours kv_b_proj [H (own + value), R], llama.cpp's the transposed keys
[H, R, own] and the values [H, value, R]. experts: ours [E, O, I], theirs E matrices [O, I], llama.cpp's as ours."""

PREFIX = "language_model."
"""In front of every name of the text model where the checkpoint is of a `KimiK3ForConditionalGeneration`."""

OUTSIDE = (
    Name("model.embed_tokens.weight", "embed_tokens.weight", "token_embd.weight"),
    Name("model.norm.weight", "norm.weight", "output_norm.weight"),
    Name("lm_head.weight", "lm_head.weight", "output.weight"),
)
"""What is not in a layer, with whole names; ours are those of `attnres.model.Decoder`."""

_CONVOLUTIONS = tuple(
    Name(f"self_attn.{x}_conv1d.weight", f"{x}_conv1d", f"ssm_conv1d_{x}.weight", "conv") for x in ("q", "k", "v")
)

ATTENTION = {
    "kda": (
        Name("input_layernorm.weight", "norm.weight", "attn_norm.weight"),
        Name("self_attn.q_proj.weight", "q_proj.weight", "attn_q.weight"),
        Name("self_attn.k_proj.weight", "k_proj.weight", "attn_k.weight"),
        Name("self_attn.v_proj.weight", "v_proj.weight", "attn_v.weight"),
        *_CONVOLUTIONS,
        Name("self_attn.f_a_proj.weight", "f_a_proj.weight", "ssm_f_a.weight"),
        Name("self_attn.f_b_proj.weight", "f_b_proj.weight", "ssm_f_b.weight"),
        Name("self_attn.A_log", "A_log", "ssm_a", "decay"),
        Name("self_attn.dt_bias", "dt_bias", "ssm_dt.bias"),
        Name("self_attn.b_proj.weight", "b_proj.weight", "ssm_beta.weight"),
        Name("self_attn.g_proj.weight", "g_proj.weight", "ssm_g.weight"),
        Name("self_attn.o_norm.weight", "o_norm.weight", "ssm_norm.weight"),
        Name("self_attn.o_proj.weight", "o_proj.weight", "attn_output.weight"),
    ),
    "mla": (
        Name("input_layernorm.weight", "norm.weight", "attn_norm.weight"),
        Name("self_attn.q_proj.weight", "q_proj.weight", "attn_q.weight"),
        Name("self_attn.q_a_proj.weight", "q_a_proj.weight", "attn_q_a.weight"),
        Name("self_attn.q_a_layernorm.weight", "q_a_layernorm.weight", "attn_q_a_norm.weight"),
        Name("self_attn.q_b_proj.weight", "q_b_proj.weight", "attn_q_b.weight"),
        Name("self_attn.kv_a_proj_with_mqa.weight", "kv_a_proj_with_mqa.weight", "attn_kv_a_mqa.weight"),
        Name("self_attn.kv_a_layernorm.weight", "kv_a_layernorm.weight", "attn_kv_a_norm.weight"),
        Name("self_attn.kv_b_proj.weight", "kv_b_proj.weight", "attn_k_b.weight attn_v_b.weight", "latent"),
        Name("self_attn.g_proj.weight", "g_proj.weight", "attn_gate.weight"),
        Name("self_attn.o_proj.weight", "o_proj.weight", "attn_output.weight"),
    ),
}
"""By our kind of attention. A layer has of q_proj and q_a_proj .. q_b_proj one or the other (q_lora_rank), and an mla
layer g_proj or not (mla_use_output_gate)."""

LOW_RANK_GATE = (
    Name("self_attn.g_a_proj.weight", "g_a_proj.weight", ""),
    Name("self_attn.g_b_proj.weight", "g_b_proj.weight", ""),
)
"""What a kda layer has in place of g_proj without a full-rank gate, as in Kimi Linear: g_proj is g_b_proj @ g_a_proj.
Kimi K3's engines know g_proj alone."""

FEED_FORWARD = {
    "swiglu": (
        Name("post_attention_layernorm.weight", "norm.weight", "ffn_norm.weight"),
        Name("mlp.gate_proj.weight", "gate_proj.weight", "ffn_gate.weight"),
        Name("mlp.up_proj.weight", "up_proj.weight", "ffn_up.weight"),
        Name("mlp.down_proj.weight", "down_proj.weight", "ffn_down.weight"),
    ),
    "experts": (
        Name("post_attention_layernorm.weight", "norm.weight", "ffn_norm.weight"),
        Name("block_sparse_moe.gate.weight", "router.weight", "ffn_gate_inp.weight"),
        Name("block_sparse_moe.gate.e_score_correction_bias", "correction_bias", "exp_probs_b.bias"),
        Name("block_sparse_moe.experts.{expert}.w1.weight", "gate_proj", "ffn_gate_exps.weight", "experts"),
        Name("block_sparse_moe.experts.{expert}.w3.weight", "up_proj", "ffn_up_exps.weight", "experts"),
        Name("block_sparse_moe.experts.{expert}.w2.weight", "down_proj", "ffn_down_exps.weight", "experts"),
        *(
            Name(
                f"block_sparse_moe.shared_experts.{x}_proj.weight",
                f"shared_experts.{x}_proj.weight",
                f"ffn_{x}_shexp.weight",
            )
            for x in ("gate", "up", "down")
        ),
        *(
            Name(
                f"block_sparse_moe.routed_expert_{x}.weight",
                f"routed_expert_{x}.weight",
                f"ffn_routed_{x.removesuffix('_proj')}.weight",
            )
            for x in ("down_proj", "up_proj", "norm")
        ),
    ),
}
"""By our kind of feed-forward network. There are shared_experts if num_shared_experts is not 0, and routed_expert_* if
the experts are latent (routed_expert_hidden_size)."""


class Read(NamedTuple):
    """The read in front of a layer: `theirs` is what comes before "_norm.weight" [D] and "_proj.weight" [1, D], which
    are a row of our key_norm and of our pseudo_query; `gguf` has the product of the two, [D]."""

    theirs: str
    gguf: str


READS = (Read("self_attention_res", "attn_res_score.weight"), Read("mlp_res", "ffn_res_score.weight"))
"""Those of a layer i of theirs, rows 2 i and 2 i + 1 of ours, behind "layers.{i}." and "blk.{i}."."""

OUTPUT_READ = Read("model.output_attn_res", "output_res_score.weight")
"""That in front of the final norm, our last row, with whole names."""
