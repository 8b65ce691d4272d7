"""Kimi K3's config.json as a config of ours. What this package would compute otherwise is refused, before a weight is
read.

Their decoder layer is two layers of ours, so that blocks of attn_res_block_size are blocks of twice as many; the mix is
the paper's mean over the sources (no `stream_scale`), with the eps of all norms. Sources: llama.cpp's
`conversion/kimi_k3.py` and `src/models/kimi-k3.cpp`, and vLLM's `transformers_utils/configs/kimi_linear.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ... import json_text
from ...errors import UsageError, check_counts
from ..configuration import AttnResConfig

_SAME = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "rms_norm_eps"),
    *("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"),
)
"""Settings that there must be, named as ours."""
_DEFAULTS: dict[str, Any] = {
    "max_position_embeddings": 4096,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "q_lora_rank": None,
    "mla_use_output_gate": False,
    "first_k_dense_replace": 0,
    "routed_scaling_factor": 1.0,
    "hidden_act": "silu",
}
"""Settings that there may be, named as ours."""
_ONLY: dict[str, tuple[Any, ...]] = {
    "mla_use_nope": (True,),
    "hidden_act": ("silu", "situ"),
    "num_nextn_predict_layers": (0, None),
    "attention_bias": (False, None),
    "logit_scale": (1, None),
}
_ONLY_OF_EXPERTS: dict[str, tuple[Any, ...]] = {
    "moe_router_activation_func": ("sigmoid", None),
    "moe_renormalize": (True, None),
    "moe_layer_freq": (1, None),
    "num_expert_group": (1, None),
    "topk_group": (1, None),
    "topk_method": ("noaux_tc", None),
}
"""What a setting must be, None where it may be absent; what it says otherwise this package does not compute."""


def text_of(folder: str | Path) -> dict[str, Any] | None:
    """The text model's settings of a folder in Kimi K3's layout: one that is of type kimi_k3, or kimi_linear with
    Attention Residuals. None for everything else, also what cannot be read."""
    try:
        whole = json_text.parse_object((Path(folder) / "config.json").read_bytes())
    except (OSError, ValueError):  # whoever reads the config says what is wrong with it
        return None
    text = whole.get("text_config", whole)
    if not isinstance(text, dict):
        return None
    has_depth = text.get("model_type") == "kimi_linear" and text.get("attn_res_block_size") is not None
    if whole.get("model_type") != "kimi_k3" and not has_depth:
        return None
    outside = ("bos_token_id", "eos_token_id", "pad_token_id", "dtype", "torch_dtype", "quantization_config")
    return {**{name: whole[name] for name in outside if name in whole}, **text}


def native(text: dict[str, Any]) -> AttnResConfig:
    """The config of an `AttnResForCausalLM` that computes what the text model does.

    text: what `text_of` returns. Raises UsageError for what is missing, and for what this package does not compute.
    """
    _check(text)
    block_size: Any = text.get("attn_res_block_size")
    check_counts(attn_res_block_size=block_size)
    fields = {name: _there(text, name) for name in _SAME}
    fields |= {name: text.get(name, default) for name, default in _DEFAULTS.items()}
    if "model_max_length" in text:  # as transformers writes it
        fields["max_position_embeddings"] = text["model_max_length"]
    fields |= {"head_dim": text.get("head_dim") or text["v_head_dim"], **_attention(text), **_experts(text)}
    if fields["hidden_act"] == "situ":
        fields["activation_situ_beta"] = _there(text, "activation_situ_beta")
        fields["activation_situ_linear_beta"] = text.get("activation_situ_linear_beta") or 0.0
    dtype = text.get("dtype", text.get("torch_dtype"))
    return AttnResConfig(
        **fields,
        residual="block_attnres",
        residual_options={"block_size": 2 * block_size, "eps": text["rms_norm_eps"], "stream_scale": False},
        **{name: text[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if name in text},
        **({} if dtype is None else {"dtype": dtype}),
    )


def _there(values: dict[str, Any], name: str, where: str = "") -> Any:
    if values.get(name) is None:
        raise UsageError(f"{where}{name} is missing in the config.json of the Kimi K3 model; fetch it again")
    return values[name]


def _check(text: dict[str, Any]) -> None:
    if text.get("quantization_config"):
        method = text["quantization_config"]
        named = " ".join(str(method[n]) for n in ("quant_method", "format") if n in method) if method else ""
        raise UsageError(
            f"the Kimi K3 model is quantised ({named}), and its weights are read in bf16 or wider only; "
            "take a checkpoint that has been dequantised"
        )
    if text.get("attn_res_block_size") is None:
        raise UsageError("the kimi_k3 model has no attn_res_block_size, and so no Attention Residuals to read")
    allowed = {**_ONLY, **(_ONLY_OF_EXPERTS if text.get("num_experts") else {})}
    for name, values in allowed.items():
        if text.get(name) not in values:
            wanted = " or ".join(str(value) for value in values if value is not None)
            raise UsageError(f"of Kimi K3 models {name} must be {wanted} to be read here; it is {text.get(name)!r}")
    heads = text.get("num_attention_heads")
    if text.get("num_key_value_heads") not in (None, heads):
        raise UsageError(
            f"of Kimi K3 models num_key_value_heads must be num_attention_heads, {heads}, to be read here; it is "
            f"{text['num_key_value_heads']}"
        )


def _attention(text: dict[str, Any]) -> dict[str, Any]:
    linear = _there(text, "linear_attn_config")
    if not isinstance(linear, dict):
        raise UsageError("linear_attn_config must be an object in the config.json of the Kimi K3 model; fetch it again")
    blocks = range(1, text["num_hidden_layers"] + 1)
    full, delta = (linear.get(name) or [] for name in ("full_attn_layers", "kda_layers"))
    if sorted([*full, *delta]) != list(blocks):
        raise UsageError(
            f"full_attn_layers and kda_layers of linear_attn_config must name each of the layers 1 .. {len(blocks)} "
            f"once; they are {full} and {delta}"
        )
    found: dict[str, Any] = {"attention_pattern": tuple("mla" if block in full else "kda" for block in blocks)}
    if delta:
        where = "linear_attn_config."
        found |= {
            "linear_num_heads": _there(linear, "num_heads", where),
            "linear_head_dim": _there(linear, "head_dim", where),
            "linear_conv_kernel_dim": _there(linear, "short_conv_kernel_size", where),
            "linear_gate_lower_bound": linear.get("gate_lower_bound"),
            "linear_full_rank_gate": bool(linear.get("use_full_rank_gate")),
        }
    return found


def _experts(text: dict[str, Any]) -> dict[str, Any]:
    if not text.get("num_experts"):
        return {"num_experts": 0}
    return {
        "num_experts": text["num_experts"],
        "num_experts_per_tok": _there(text, "num_experts_per_token"),
        "num_shared_experts": text.get("num_shared_experts") or 0,
        "moe_intermediate_size": _there(text, "moe_intermediate_size"),
        "routed_expert_hidden_size": text.get("routed_expert_hidden_size"),
        "latent_moe_use_norm": bool(text.get("latent_moe_use_norm")),
    }
