"""A GGUF file of the architecture "kimi-k3", as stock llama.cpp loads it.

The package gguf writes the container; its table of architectures is older than Kimi K3, so keys are spelt out here.
Source: llama.cpp's `conversion/kimi_k3.py` and `src/models/kimi-k3.cpp`. One tensor at a time is in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import UsageError
from ..hf.kimi_k3.names import Read
from ..model import DecoderConfig
from .kimi_k3 import text_config
from .parts import Part
from .vocabulary import Vocabulary

ARCHITECTURE = "kimi-k3"
OUTTYPES = {"f32": 0, "f16": 1, "bf16": 32, "q8_0": 7}
"""Types of the matrices, with llama.cpp's number of a file of that type."""
SINGLE = ("ffn_gate_inp.weight", "ssm_conv1d_q.weight", "ssm_conv1d_k.weight", "ssm_conv1d_v.weight")
"""Matrices that stay f32 whatever the type: routers and convolutions. So does all that is no matrix."""
SLICE = 2**24
"""Numbers of a tensor that are in memory at once beside the model."""
SIGMOID = 2  # of llama.cpp's gating functions


def library() -> Any:
    """The package gguf. Raises UsageError where it is missing."""
    try:
        import gguf
    except ImportError as error:
        raise UsageError("a GGUF file needs the package gguf; run: pip install 'gguf>=0.17'") from error
    return gguf


def check(config: DecoderConfig) -> None:
    """Raises UsageError for a model in Kimi K3's layout that llama.cpp cannot run."""
    for kind in ("kda", "mla"):
        if kind not in config.attention_kinds:
            raise UsageError(
                f"llama.cpp runs Kimi K3 where it has kda and mla layers, and the model has no {kind} layer; "
                "export --to kimi-k3, or a model that has both"
            )


def write(
    path: Path,
    parts: Callable[[], Iterator[Part]],
    config: DecoderConfig,
    block_size: int,
    vocabulary: Vocabulary,
    name: str,
    outtype: str,
    report: Callable[[int | None], None],
) -> None:
    """Writes the file.

    parts: begins the model's parts anew. block_size: decoder layers in a block. name: the model's. outtype: one of
    `OUTTYPES`. report: called with the layer of each part. Raises OSError, UsageError where gguf is missing.
    """
    gguf = library()
    writer = gguf.GGUFWriter(None, ARCHITECTURE)
    writer.add_name(name)
    writer.add_file_type(OUTTYPES[outtype])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for key, value in metadata(config, block_size).items():
        {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, list: writer.add_array}[type(value)](
            f"{ARCHITECTURE}.{key}", value
        )
    vocabulary.add_to(writer, config.vocab_size)
    for part in parts():
        for tensor_name, tensor in named(part, config):
            kind = gguf.GGMLQuantizationType[_kind(tensor_name, tensor, outtype)]
            numbers, size = gguf.GGML_QUANT_SIZES[kind]  # of a block
            bytes_ = tensor.numel() // numbers * size
            writer.add_tensor_info(tensor_name, tuple(tensor.shape), np.dtype(np.float32), bytes_, kind)
    try:
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for part in parts():
            report(part.layer)
            for tensor_name, tensor in named(part, config):
                kind = gguf.GGMLQuantizationType[_kind(tensor_name, tensor, outtype)]
                _write_tensor(writer, tensor, partial(gguf.quants.quantize, qtype=kind))
    finally:
        writer.close()


def _write_tensor(writer: Any, tensor: Tensor, encode: Callable[[Any], Any]) -> None:
    """What the writer's own method does, a slice of rows at a time: the experts of a layer may be tens of gigabytes."""
    file = writer.fout[0]
    writer.write_padding(file, file.tell())
    for rows in tensor.reshape(-1, tensor.shape[-1]).split(max(1, SLICE // tensor.shape[-1])):
        encode(np.ascontiguousarray(rows.float().numpy())).tofile(file)
    writer.write_padding(file, file.tell())


def metadata(config: DecoderConfig, block_size: int) -> dict[str, Any]:
    """The architecture's keys, without its name in front."""
    text = text_config(config, block_size, {})
    linear = text["linear_attn_config"]
    assert config.kv_lora_rank and config.qk_rope_head_dim and config.qk_nope_head_dim
    values = {
        "vocab_size": config.vocab_size,
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "rope.dimension_count": config.qk_rope_head_dim,
        "attention.head_count": config.num_attention_heads,
        # latent attention has one wide head of keys, and 0 marks a kda layer
        "attention.head_count_kv": [int(kind == "mla") for kind in config.attention_kinds],
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "attention.kv_lora_rank": config.kv_lora_rank,
        "attention.key_length": config.kv_lora_rank + config.qk_rope_head_dim,
        "attention.value_length": config.kv_lora_rank,
        "attention.key_length_mla": config.qk_nope_head_dim + config.qk_rope_head_dim,
        "attention.value_length_mla": config.v_head_dim,
        "ssm.conv_kernel": linear["short_conv_kernel_size"],
        "kda.head_dim": linear["head_dim"],
        "expert_count": text.get("num_experts", 0),
        "expert_used_count": text.get("num_experts_per_token", 0),
        "expert_shared_count": text["num_shared_experts"],
        "expert_feed_forward_length": text["moe_intermediate_size"],
        "expert_weights_scale": float(text["routed_scaling_factor"]),
        "expert_weights_norm": text["moe_renormalize"],
        "expert_gating_func": SIGMOID,
        "leading_dense_block_count": text["first_k_dense_replace"],
        "activation.situ_beta": float(text["activation_situ_beta"]),
        "activation.situ_linear_beta": float(text["activation_situ_linear_beta"]),
        "attn_res.block_size": block_size,
    }
    optional = {
        "attention.q_lora_rank": text["q_lora_rank"],
        "kda.gate_lower_bound": linear.get("gate_lower_bound"),
        "expert_latent_length": text.get("routed_expert_hidden_size"),
    }
    return values | {key: value for key, value in optional.items() if value is not None}


def named(part: Part, config: DecoderConfig) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a file that a part is, by their whole names; their last dimension is llama.cpp's first."""
    name, prefix = part.name, "" if part.layer is None else f"blk.{part.layer}."
    if isinstance(name, Read):
        query, key_norm = part.tensors
        yield prefix + name.gguf, query.float() * key_norm.float()
        return
    (tensor,) = part.tensors
    if name.form == "latent":
        assert config.qk_nope_head_dim and config.v_head_dim
        sizes = [config.qk_nope_head_dim, config.v_head_dim]
        k, v = tensor.unflatten(0, (config.num_attention_heads, -1)).split(sizes, 1)
        yield from zip((prefix + gguf for gguf in name.gguf.split()), (k.mT, v), strict=True)
        return
    yield prefix + name.gguf, _formed(tensor, name.form)


def _formed(tensor: Tensor, form: str) -> Tensor:
    if form == "conv":
        return tensor[None, :, None]
    return -torch.exp(tensor.float()) if form == "decay" else tensor


def _kind(name: str, tensor: Tensor, outtype: str) -> str:
    """The type of a tensor. Rows that are no whole blocks of q8_0 are f16, as llama.cpp's converter has them."""
    if tensor.dim() < 2 or name.endswith(SINGLE):
        return "F32"
    return "F16" if outtype == "q8_0" and tensor.shape[-1] % 32 else outtype.upper()
