"""A tiny random model of any causal type that transformers knows, from what its config has by default."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .converted import randomise

TYPES = [
    name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name in CONFIG_MAPPING and not name.startswith("attnres")
]
LAYERS = 4
SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size",), 61),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "embed_dim"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "multi_query_group_num"), 2),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "dense_intermediate_size"), 48),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length"), 64),
    **dict.fromkeys(("head_dim", "attention_head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank"), 16),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "num_shared_experts"), 1),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers"), 1),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 16),
    **dict.fromkeys(("linear_num_key_heads",), 2),
    **dict.fromkeys(("linear_num_value_heads",), 4),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8),
    **dict.fromkeys(("sliding_window",), 5),
    **dict.fromkeys(("pad_token_id",), 0),
    **dict.fromkeys(("bos_token_id",), 1),
    **dict.fromkeys(("eos_token_id",), 2),
}
SIZES |= dict.fromkeys(("decoder_layers", "encoder_layers", "num_encoder_layers", "num_decoder_layers"), LAYERS)
SIZES |= dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), 4)
SIZES |= dict.fromkeys(("num_encoder_attention_heads", "num_decoder_attention_heads"), 4)
SIZES |= {"index_n_heads": 2, "index_head_dim": 8, "shared_experts_intermediate_size": 16}
SIZES |= dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim", "dff", "dim_ff"), 48)
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 4}
EXTRA: dict[str, dict[str, Any]] = {
    "bamba": {**_MAMBA, "attn_layer_indices": [1, 3]},
    "biogpt": {"hidden_dropout_prob": 0.0, "activation_dropout": 0.0},
    "codegen": {"rotary_dim": 4},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_key_value_heads": 2, "num_experts_per_tok": 2},
    "dots3_note_text": {"layer_types": ["indexed_attention"] * LAYERS},  # layers of other types have other sizes
    "falcon": {"new_decoder_architecture": True},
    "gemma3n_text": {
        "num_kv_shared_layers": 0,
        "vocab_size_per_layer_input": 61,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 4,
        "activation_sparsity_pattern": [0.0] * LAYERS,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 4},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": {**_MAMBA, "layer_types": ["linear_attention", "full_attention"] * 2},
    "granitemoeshared": {"shared_intermediate_size": 24},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8, "mamba_dt_rank": 4},
    "kimi_linear": {"linear_num_heads": 2, "linear_head_dim": 8},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2, "head_dim": 8},
    "opt": {"dropout": 0.0, "word_embed_proj_dim": 32},
    "prophetnet": {"is_decoder": True},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
        "hc_lowrank": 4,
        "ple_embed_dim": 16,
        "ngram_vocab_size_base": 61,
        "split_ngram_parts": 1,
        "make_ngram_vocab_size_divisible_by": 1,
    },
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "xglm": {"dropout": 0.0, "activation_dropout": 0.0},
    "zaya": {"num_experts_per_tok": 1},
}
"""What a type needs besides, and dropouts that a layer has of its own, which a conversion refuses unless they are 0."""


def config(model_type: str) -> Any:
    return _small(CONFIG_MAPPING[model_type], EXTRA.get(model_type, {}))


def _small(kind: Any, changes: dict[str, Any]) -> Any:
    default = kind()
    known = {name: value for name, value in SIZES.items() if _of(default, name) is not None}
    if _of(default, "kv_lora_rank"):
        known["num_key_value_heads"] = 4
    parts = {name: value for name, value in vars(default).items() if isinstance(value, PreTrainedConfig)}
    known |= {name: _small(type(value), EXTRA.get(value.model_type, {})) for name, value in parts.items()}
    depth = _of(default, "num_hidden_layers")
    for name, value in vars(default).items():
        if isinstance(value, list) and len(value) == depth:  # of each layer
            kinds = list(dict.fromkeys(value))
            known[name.removeprefix("_")] = [kinds[i % len(kinds)] for i in range(LAYERS)]
    known |= changes
    try:
        return kind(**known)
    except Exception:  # some take fewer of these: one after the other
        kept = dict(changes)
        for name, value in known.items():
            try:
                kind(**kept, **({} if name in kept else {name: value}))
            except Exception:
                continue
            kept[name] = value
        return kind(**kept)


def _of(default: Any, name: str) -> Any:
    try:
        return getattr(default, name, None)
    except Exception:  # an attribute that differs from layer to layer
        return vars(default).get(name)


UNBUILT = {
    **dict.fromkeys(("musicgen", "musicgen_melody"), "is one that AutoModelForCausalLM cannot make of its own config"),
    **dict.fromkeys(("gemma4_assistant", "gemma4_unified_assistant"), "shares the cache of the model that it assists"),
    "gemma3n": "needs timm, an optional package",
}
"""Types of which no tiny model is built, and why."""


def build(model_type: str, dtype: torch.dtype = torch.float64) -> Any:
    """A model in evaluation mode; one that stays large all the same is without data."""
    values = config(model_type)
    with pytest.MonkeyPatch.context() as patch:
        for package in ("fla", "causal_conv1d", "mamba_ssm"):  # whose kernels know no CPU
            patch.setitem(sys.modules, package, None)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(values, attn_implementation="eager")
        if model.num_parameters() > 5e6:
            return model.eval()
        model = transformers.AutoModelForCausalLM.from_config(values, attn_implementation="eager")
    if dtype == torch.float64 and "expert" in " ".join(dict(model.named_parameters())):
        model.set_experts_implementation("eager")  # the grouped kernel knows no double precision
    return randomise(model).to(dtype).eval()


@contextmanager
def in_double() -> Iterator[None]:
    """Within it nothing that is computed in double precision goes through single precision: norms, routers and others
    ask for that, and their last digits would hide or feign differences."""
    to, as_float, softmax = torch.Tensor.to, torch.Tensor.float, torch.nn.functional.softmax

    def stays(tensor: Any, dtype: Any) -> bool:
        return tensor.dtype == torch.float64 and dtype == torch.float32

    def to_wide(self: Any, *args: Any, **kwargs: Any) -> Any:
        asked = [*args, *kwargs.values()]
        return self if any(isinstance(a, torch.dtype) and stays(self, a) for a in asked) else to(self, *args, **kwargs)

    def softmax_wide(x: Any, dim: Any = None, _stacklevel: int = 3, dtype: Any = None) -> Any:
        return softmax(x, dim=dim, dtype=None if dtype is not None and stays(x, dtype) else dtype)

    def float_wide(self: Any, *args: Any, **kwargs: Any) -> Any:
        whole = not self.is_floating_point()  # positions, which meet frequencies in double precision
        return self.double() if whole or self.dtype == torch.float64 else as_float(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "to", to_wide)
        patch.setattr(torch.Tensor, "float", float_wide)
        patch.setattr(torch.nn.functional, "softmax", softmax_wide)
        yield
