"""A folder in Kimi K3's checkpoint layout: config.json, safetensors, and what the tokenizer needs.

silu(g) is the limit of b tanh(g / b) sigmoid(g) for a large b (`BETA`). A read with `stream_scale` is Kimi K3's times
its number of sources n, which the RMSNorm behind it takes away again, but for its eps: beside the mean square of a read
theirs has rms_norm_eps where ours has that / n^2. Nor has theirs an eps of its own for keys.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from ..hf.kimi_k3.names import PREFIX, Read
from ..model import DecoderConfig
from .parts import Part

BETA = 2.0**14
"""b for silu. At |g| <= 20 the limit is off by less than 1e-6 of silu(g), at 100 by 1e-5; a tanh that is made of exp in
single precision adds 1e-3 at the most, which would grow with b. A power of two scales without rounding."""
SHARD_BYTES = 5 * 10**9


def write(
    folder: Path,
    parts: Iterator[Part],
    config: DecoderConfig,
    block_size: int,
    tokens: dict[str, Any],
    dtype: str,
    report: Callable[[int | None], None],
) -> None:
    """Fills an empty folder with config.json and weights.

    block_size: decoder layers in a block. tokens: bos_token_id and the like. dtype: of the weights. report: called with
    the layer of each part. Raises OSError.
    """
    shard: dict[str, Tensor] = {}
    where: dict[str, int] = {}
    number, size, total = 1, 0, 0
    for part in parts:
        report(part.layer)
        for name, tensor in named(part):
            if shard and size + tensor.nbytes > SHARD_BYTES:
                save_file(shard, _shard(folder, number), metadata={"format": "pt"})
                shard, number, size = {}, number + 1, 0
            shard[name] = tensor.clone()  # its own memory: safetensors refuses tied ones and views
            where[name] = number
            size, total = size + tensor.nbytes, total + tensor.nbytes
    save_file(shard, _shard(folder, number), metadata={"format": "pt"})
    _name_shards(folder, number, where, total)
    text = text_config(config, block_size, tokens) | {"dtype": dtype}
    whole = {
        "architectures": ["KimiK3ForConditionalGeneration"],
        "model_type": "kimi_k3",
        "dtype": dtype,
        "tie_word_embeddings": False,
        **tokens,
        "text_config": text,
    }
    (folder / "config.json").write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")


def named(part: Part) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a checkpoint that a part is, by their whole names."""
    name, prefix = part.name, PREFIX if part.layer is None else f"{PREFIX}model.layers.{part.layer}."
    if isinstance(name, Read):
        query, key_norm = part.tensors
        yield f"{prefix}{name.theirs}_norm.weight", key_norm
        yield f"{prefix}{name.theirs}_proj.weight", query[None]
        return
    (tensor,) = part.tensors
    if name.form == "experts":
        for expert, matrix in enumerate(tensor):
            yield prefix + name.theirs.format(expert=expert), matrix
    else:
        yield prefix + name.theirs, tensor[:, None] if name.form == "conv" else tensor


def text_config(config: DecoderConfig, block_size: int, tokens: dict[str, Any]) -> dict[str, Any]:
    """The text model's part of config.json."""
    kinds = config.attention_kinds
    situ = config.hidden_act == "situ"
    linear = {
        "full_attn_layers": [i + 1 for i, kind in enumerate(kinds) if kind == "mla"],
        "kda_layers": [i + 1 for i, kind in enumerate(kinds) if kind == "kda"],
        "short_conv_kernel_size": config.linear_conv_kernel_dim,
        "head_dim": config.linear_head_dim,
        "num_heads": config.linear_num_heads,
        "use_full_rank_gate": True,
    }
    if config.linear_gate_lower_bound is not None:
        linear["gate_lower_bound"] = config.linear_gate_lower_bound
    values = {
        "architectures": ["KimiLinearForCausalLM"],
        "model_type": "kimi_linear",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_attention_heads,
        "head_dim": config.head_dim,
        "hidden_act": "situ",
        "activation_situ_beta": config.activation_situ_beta if situ else BETA,
        "activation_situ_linear_beta": config.activation_situ_linear_beta if situ else 0.0,
        "rms_norm_eps": config.rms_norm_eps,
        "attn_res_block_size": block_size,
        "tie_word_embeddings": False,
        "max_position_embeddings": config.max_position_embeddings,
        "initializer_range": config.initializer_range,
        "q_lora_rank": config.q_lora_rank,
        "kv_lora_rank": config.kv_lora_rank,
        "qk_nope_head_dim": config.qk_nope_head_dim,
        "qk_rope_head_dim": config.qk_rope_head_dim,
        "v_head_dim": config.v_head_dim,
        "mla_use_nope": True,
        "mla_use_output_gate": config.mla_use_output_gate,
        "linear_attn_config": linear,
        **_experts(config),
        **tokens,
    }
    return values


def _experts(config: DecoderConfig) -> dict[str, Any]:
    routed = any(config.has_experts(layer) for layer in range(config.num_hidden_layers))
    values: dict[str, Any] = {
        "num_shared_experts": config.num_shared_experts if routed else 0,
        "moe_intermediate_size": config.moe_intermediate_size,
        "moe_renormalize": True,
        "moe_router_activation_func": "sigmoid",
        "routed_scaling_factor": config.routed_scaling_factor,
        "first_k_dense_replace": config.first_k_dense_replace if routed else config.num_hidden_layers,
        "moe_layer_freq": 1,
        "num_expert_group": 1,
        "topk_group": 1,
        "use_grouped_topk": True,
    }
    if routed:
        values |= {"num_experts": config.num_experts, "num_experts_per_token": config.num_experts_per_tok}
        if config.routed_expert_hidden_size is not None:
            values["routed_expert_hidden_size"] = config.routed_expert_hidden_size
            values["latent_moe_use_norm"] = config.latent_moe_use_norm
    return values


def _shard(folder: Path, number: int) -> Path:
    return folder / f"shard-{number}.safetensors"


def _name_shards(folder: Path, count: int, where: dict[str, int], total: int) -> None:
    """Gives the files the names that loaders expect, for which one must know how many there are."""
    if count == 1:
        _shard(folder, 1).rename(folder / "model.safetensors")
        return
    names = {number: f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)}
    for number, name in names.items():
        _shard(folder, number).rename(folder / name)
    index = {"metadata": {"total_size": total}, "weight_map": {name: names[number] for name, number in where.items()}}
    text = json.dumps(index, indent=2) + "\n"
    (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
