"""Tiny checkpoints in Kimi K3's layout, and its forward pass written out from the formulas, one token and one head at a
time, which knows nothing of this package."""

import json
import random
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

TEXT: dict[str, Any] = {
    "model_type": "kimi_linear",
    "vocab_size": 41,
    "hidden_size": 24,
    "intermediate_size": 28,
    "num_hidden_layers": 5,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "hidden_act": "situ",
    "activation_situ_beta": 1.3,
    "activation_situ_linear_beta": 2.5,
    "rms_norm_eps": 1e-5,
    "attn_res_block_size": 2,  # the last block has one layer
    "tie_word_embeddings": False,
    "max_position_embeddings": 64,
    "q_lora_rank": 10,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "mla_use_nope": True,
    "mla_use_output_gate": True,
    "num_experts": 5,
    "num_experts_per_token": 2,
    "num_shared_experts": 2,
    "moe_intermediate_size": 7,
    "moe_renormalize": True,
    "moe_router_activation_func": "sigmoid",
    "routed_scaling_factor": 1.7,
    "routed_expert_hidden_size": 16,
    "latent_moe_use_norm": True,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "num_expert_group": 1,
    "topk_group": 1,
    "use_grouped_topk": True,
    "num_nextn_predict_layers": 0,
    "linear_attn_config": {
        "full_attn_layers": [3, 5],
        "kda_layers": [1, 2, 4],
        "short_conv_kernel_size": 4,
        "head_dim": 6,
        "num_heads": 3,
        "use_full_rank_gate": True,
        "gate_lower_bound": -5.0,
    },
}
IDS = torch.randint(0, 41, (2, 9), generator=torch.Generator().manual_seed(0))


def text(**changes: Any) -> dict[str, Any]:
    """TEXT with changes; those of linear_attn_config by their own names, and None for what is to be left out."""
    linear = {**TEXT["linear_attn_config"], **{k: v for k, v in changes.items() if k in TEXT["linear_attn_config"]}}
    values = {**TEXT, **{k: v for k, v in changes.items() if k not in linear}, "linear_attn_config": linear}
    for part in (values, linear):
        for name in [name for name, value in part.items() if value is None]:
            del part[name]
    return values


def shapes(c: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor, without the prefix of a model for images."""
    D, V, linear, heads = c["hidden_size"], c["vocab_size"], c["linear_attn_config"], c["num_attention_heads"]
    H, E = linear["num_heads"], linear["head_dim"]
    nope, rope, value, rank = (c[n] for n in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "kv_lora_rank"))
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (V, D),
        "model.norm.weight": (D,),
        "model.output_attn_res_norm.weight": (D,),
        "model.output_attn_res_proj.weight": (1, D),
    }
    if not c["tie_word_embeddings"]:
        found["lm_head.weight"] = (V, D)

    def mlp(prefix: str, inner: int) -> dict[str, tuple[int, ...]]:
        return {f"{prefix}.{n}_proj.weight": (inner, D) for n in ("gate", "up")} | {
            f"{prefix}.down_proj.weight": (D, inner)
        }

    for i in range(c["num_hidden_layers"]):
        layer: dict[str, tuple[int, ...]] = {"input_layernorm.weight": (D,), "post_attention_layernorm.weight": (D,)}
        for read in ("self_attention_res", "mlp_res"):
            layer |= {f"{read}_norm.weight": (D,), f"{read}_proj.weight": (1, D)}
        a = "self_attn."
        if i + 1 in linear["kda_layers"]:
            N = H * E
            layer |= {f"{a}{n}_proj.weight": (N, D) for n in "qkv"} | {
                f"{a}{n}_conv1d.weight": (N, 1, 4) for n in "qkv"
            }
            layer |= {a + "f_a_proj.weight": (E, D), a + "f_b_proj.weight": (N, E), a + "b_proj.weight": (H, D)}
            layer |= {a + "A_log": (H,), a + "dt_bias": (N,), a + "o_norm.weight": (E,), a + "o_proj.weight": (D, N)}
            if linear.get("use_full_rank_gate"):
                layer[a + "g_proj.weight"] = (N, D)
            else:
                layer |= {a + "g_a_proj.weight": (E, D), a + "g_b_proj.weight": (N, E)}
        else:
            queries = heads * (nope + rope)
            if c.get("q_lora_rank"):
                layer |= {a + "q_a_proj.weight": (c["q_lora_rank"], D), a + "q_a_layernorm.weight": (c["q_lora_rank"],)}
                layer[a + "q_b_proj.weight"] = (queries, c["q_lora_rank"])
            else:
                layer[a + "q_proj.weight"] = (queries, D)
            layer |= {a + "kv_a_proj_with_mqa.weight": (rank + rope, D), a + "kv_a_layernorm.weight": (rank,)}
            layer[a + "kv_b_proj.weight"] = (heads * (nope + value), rank)
            layer[a + "o_proj.weight"] = (D, heads * value)
            if c.get("mla_use_output_gate"):
                layer[a + "g_proj.weight"] = (heads * value, D)
        if c.get("num_experts") and i >= c["first_k_dense_replace"]:
            m, inner, latent = "block_sparse_moe", c["moe_intermediate_size"], c.get("routed_expert_hidden_size") or D
            layer |= {
                f"{m}.gate.weight": (c["num_experts"], D),
                f"{m}.gate.e_score_correction_bias": (c["num_experts"],),
            }
            for e in range(c["num_experts"]):
                layer |= {f"{m}.experts.{e}.{w}.weight": (inner, latent) for w in ("w1", "w3")}
                layer[f"{m}.experts.{e}.w2.weight"] = (latent, inner)
            if c["num_shared_experts"]:
                layer |= mlp(f"{m}.shared_experts", c["num_shared_experts"] * inner)
            if c.get("routed_expert_hidden_size"):
                layer |= {
                    f"{m}.routed_expert_down_proj.weight": (latent, D),
                    f"{m}.routed_expert_up_proj.weight": (D, latent),
                }
            if c.get("latent_moe_use_norm"):
                layer[f"{m}.routed_expert_norm.weight"] = (latent,)
        else:
            layer |= mlp("mlp", c["intermediate_size"])
        found |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    return found


def tensors(c: dict[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """Random tensors in fp64: norms about 1, all else far enough from zero to be seen."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, shape in shapes(c).items():
        drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
        is_norm = name.endswith(("norm.weight",))
        found[name] = 1 + 0.3 * drawn if is_norm else drawn * (1.0 if len(shape) != 2 else 1.5 * shape[1] ** -0.5)
    return found


def write(
    folder: Path,
    c: dict[str, Any],
    values: dict[str, Tensor],
    *,
    images: bool = True,
    shards: int = 1,
    **whole: Any,
) -> None:
    """A checkpoint of the text model, or of one for images around it, in so many files. whole: further settings."""
    folder.mkdir(parents=True, exist_ok=True)
    config = c
    if images:
        config = {"model_type": "kimi_k3", "architectures": ["KimiK3ForConditionalGeneration"], "text_config": c}
        values = {f"language_model.{name}": tensor for name, tensor in values.items()}
        values |= {
            "vision_tower.patch_embed.proj.weight": torch.ones(3, 2),
            "mm_projector.proj.0.weight": torch.ones(2),
        }
    names = sorted(values)
    random.Random(0).shuffle(names)  # experts of a layer lie in several files
    files = (
        ["model.safetensors"] if shards == 1 else [f"model-{i:05}-of-{shards:05}.safetensors" for i in range(shards)]
    )
    for i, file in enumerate(files):
        save_file({name: values[name].clone() for name in names[i::shards]}, folder / file)
    if shards > 1:
        index = {"weight_map": {name: files[i] for i in range(shards) for name in names[i::shards]}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps({**config, **whole}))


def forward(t: dict[str, Tensor], c: dict[str, Any], ids: Tensor) -> Tensor:
    """Logits [B, T, V] in fp64."""
    eps = c["rms_norm_eps"]

    def normed(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * t[f"{name}.weight"]

    def mix(bank: list[Tensor], prefix: Tensor, name: str) -> Tensor:
        sources = torch.stack([*bank, prefix])
        keys = sources / (sources.square().mean(-1, keepdim=True) + eps).sqrt()
        scores = (keys * (t[f"{name}_norm.weight"] * t[f"{name}_proj.weight"][0])).sum(-1, keepdim=True)
        return (scores.softmax(0) * sources).sum(0)

    def situ(g: Tensor, u: Tensor) -> Tensor:
        if c["hidden_act"] == "silu":
            return g / (1 + (-g).exp()) * u
        b, limit = c["activation_situ_beta"], c.get("activation_situ_linear_beta")
        return b * (g / b).tanh() / (1 + (-g).exp()) * (limit * (u / limit).tanh() if limit else u)

    def mlp(x: Tensor, name: str, names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")) -> Tensor:
        gate, up, down = (t[f"{name}.{n}.weight"] for n in names)
        return situ(x @ gate.T, x @ up.T) @ down.T

    def delta(x: Tensor, a: str) -> Tensor:
        linear = c["linear_attn_config"]
        H, E, bound = linear["num_heads"], linear["head_dim"], linear.get("gate_lower_bound")
        y = torch.zeros_like(x)
        for b in range(len(x)):
            S = torch.zeros(H, E, E, dtype=x.dtype)
            for now in range(x.shape[1]):
                q, k, v = (torch.zeros(H * E, dtype=x.dtype) for _ in range(3))
                for n, into in zip("qkv", (q, k, v), strict=True):
                    for back in range(min(3, now) + 1):
                        into += t[f"{a}.{n}_conv1d.weight"][:, 0, 3 - back] * (
                            t[f"{a}.{n}_proj.weight"] @ x[b, now - back]
                        )
                q, k, v = ((z / (1 + (-z).exp())).view(H, E) for z in (q, k, v))
                q, k = (z / (z.square().sum(-1, keepdim=True) + 1e-6).sqrt() for z in (q, k))
                rate = t[f"{a}.f_b_proj.weight"] @ (t[f"{a}.f_a_proj.weight"] @ x[b, now]) + t[f"{a}.dt_bias"]
                rate, A = rate.view(H, E), t[f"{a}.A_log"].exp()[:, None]
                g = -A * (1 + rate.exp()).log() if bound is None else bound / (1 + (-A * rate).exp())
                beta = 1 / (1 + (-(t[f"{a}.b_proj.weight"] @ x[b, now])).exp())
                o = torch.zeros(H, E, dtype=x.dtype)
                for h in range(H):
                    S[h] = g[h].exp()[:, None] * S[h]
                    S[h] = S[h] + beta[h] * torch.outer(k[h], v[h] - S[h].T @ k[h])
                    o[h] = S[h].T @ q[h] / E**0.5
                full = t.get(f"{a}.g_proj.weight")
                full = t[f"{a}.g_b_proj.weight"] @ t[f"{a}.g_a_proj.weight"] if full is None else full
                gated = normed(o, f"{a}.o_norm").flatten() / (1 + (-(full @ x[b, now])).exp())
                y[b, now] = t[f"{a}.o_proj.weight"] @ gated
        return y

    def latent(x: Tensor, a: str) -> Tensor:
        own, shared, value, rank = (
            c[n] for n in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "kv_lora_rank")
        )
        if c.get("q_lora_rank"):
            q = normed(x @ t[f"{a}.q_a_proj.weight"].T, f"{a}.q_a_layernorm") @ t[f"{a}.q_b_proj.weight"].T
        else:
            q = x @ t[f"{a}.q_proj.weight"].T
        down = x @ t[f"{a}.kv_a_proj_with_mqa.weight"].T
        expanded = normed(down[..., :rank], f"{a}.kv_a_layernorm") @ t[f"{a}.kv_b_proj.weight"].T
        heads = []
        for h in range(c["num_attention_heads"]):
            kv = expanded[..., h * (own + value) : (h + 1) * (own + value)]
            key = torch.cat([kv[..., :own], down[..., rank:]], -1)
            scores = q[..., h * (own + shared) : (h + 1) * (own + shared)] @ key.mT / (own + shared) ** 0.5
            later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
            heads.append(scores.masked_fill(later, float("-inf")).softmax(-1) @ kv[..., own:])
        o = torch.cat(heads, -1)
        if c.get("mla_use_output_gate"):
            o = o / (1 + (-(x @ t[f"{a}.g_proj.weight"].T)).exp())
        return o @ t[f"{a}.o_proj.weight"].T

    def experts(x: Tensor, m: str) -> Tensor:
        y = torch.zeros_like(x)
        for b in range(len(x)):
            for now in range(x.shape[1]):
                score = 1 / (1 + (-(t[f"{m}.gate.weight"] @ x[b, now])).exp())
                order = (score + t[f"{m}.gate.e_score_correction_bias"]).argsort(descending=True)
                chosen = order[: c["num_experts_per_token"]].tolist()
                z = x[b, now]
                if c.get("routed_expert_hidden_size"):
                    z = t[f"{m}.routed_expert_down_proj.weight"] @ z
                weight = {e: c["routed_scaling_factor"] * score[e] / score[chosen].sum() for e in chosen}
                r = sum(weight[e] * mlp(z, f"{m}.experts.{e}", ("w1", "w3", "w2")) for e in chosen)
                r = normed(r, f"{m}.routed_expert_norm") if c.get("latent_moe_use_norm") else r
                y[b, now] = t[f"{m}.routed_expert_up_proj.weight"] @ r if c.get("routed_expert_hidden_size") else r
        return y + mlp(x, f"{m}.shared_experts") if c["num_shared_experts"] else y

    t = {name: tensor.double() for name, tensor in t.items()}
    prefix: Any = t["model.embed_tokens.weight"][ids]
    bank: list[Tensor] = []
    for i in range(c["num_hidden_layers"]):
        name = f"model.layers.{i}"
        h = mix(bank, prefix, f"{name}.self_attention_res") if bank else prefix
        if i % c["attn_res_block_size"] == 0:
            bank, prefix = [*bank, prefix], None
        attention = delta if i + 1 in c["linear_attn_config"]["kda_layers"] else latent
        a = attention(normed(h, f"{name}.input_layernorm"), f"{name}.self_attn")
        prefix = a if prefix is None else prefix + a
        h = normed(mix(bank, prefix, f"{name}.mlp_res"), f"{name}.post_attention_layernorm")
        routed = c.get("num_experts") and i >= c["first_k_dense_replace"]
        prefix = prefix + (experts(h, f"{name}.block_sparse_moe") if routed else mlp(h, f"{name}.mlp"))
    head = t["model.embed_tokens.weight" if c["tie_word_embeddings"] else "lm_head.weight"]
    return normed(mix(bank, prefix, "model.output_attn_res"), "model.norm") @ head.T
