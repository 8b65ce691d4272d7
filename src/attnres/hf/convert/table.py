"""The architectures that can be converted exactly, as a table: how each one's decoder layer treats the residual stream.

An exact conversion needs a stream that is a plain sum: every sublayer reads it (through a norm or not), and what it
adds is never rescaled afterwards. An entry names the submodules of the decoder layer and their order. A new
architecture of that shape is one more `register(Architecture(...))`; a layer whose submodules differ from its entry's
is refused.
"""

from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from ...errors import UsageError
from .layer_sum import check_sum


@dataclass(frozen=True)
class Architecture:
    """How one decoder layer computes. Fields are names of submodules or attributes, of the decoder layer unless said
    otherwise.

    Attention runs `attention(attention_norm(h))` through each of `after_attention` and the MLP `mlp(mlp_norm(h))`
    through each of `after_mlp`; what each adds to the stream is multiplied by `multiplier` if there is one.
    """

    model_type: str
    """`config.model_type` of the base model."""
    decoder_layer: str
    """Class name of the decoder layer in transformers."""
    layers: str = "layers"
    """The base model's list of decoder layers."""
    final_norm: str = "norm"
    """The base model's norm in front of the output head."""
    attention: str = "self_attn"
    linear_attention: str | None = None
    """What stands in the place of `attention` in some decoder layers of a hybrid, if it has a name of its own."""
    attention_norm: str | None = "input_layernorm"
    """None: attention reads the stream as it is."""
    after_attention: tuple[str, ...] = ()
    """Norms and dropouts on the way from attention to the stream."""
    mlp: str = "mlp"
    mlp_norm: str | None = "post_attention_layernorm"
    after_mlp: tuple[str, ...] = ()
    multiplier: str | None = None
    """Attribute that holds the factor on everything added to the stream."""
    parallel: bool | str = False
    """Whether attention and MLP read the same stream and are added together; or the attribute that says so."""
    refused_arguments: tuple[str, ...] = ()
    """Arguments of the decoder layer that must be None, because they ask for sublayers that are not described here."""

    def is_parallel(self, layer: nn.Module) -> bool:
        return bool(getattr(layer, self.parallel)) if isinstance(self.parallel, str) else self.parallel

    def attention_of(self, layer: nn.Module) -> str:
        """The submodule of a decoder layer that is its attention."""
        linear = self.linear_attention
        return linear if linear is not None and hasattr(layer, linear) else self.attention

    def submodules(self, layer: nn.Module) -> set[str]:
        """The submodules that a decoder layer must have, and no others."""
        attention, mlp = (self.attention_of(layer), self.attention_norm), (self.mlp, self.mlp_norm)
        return {name for name in (*attention, *mlp, *self.after_attention, *self.after_mlp) if name is not None}


TYPE_PREFIX = "attnres_"
"""Of the model type of a converted model."""

ARCHITECTURES: dict[str, Architecture] = {}
"""Entries by model type."""

_POST_NORM = "it normalises the stream itself after every sum, so that no read of separate outputs equals it"
_STREAMS = "it keeps several residual streams or rescales the stream, so that it is not a plain sum of outputs"
NOT_EXACT: dict[str, str] = {
    **dict.fromkeys(("albert", "bert", "distilbert", "electra", "roberta", "xlm-roberta", "openai-gpt"), _POST_NORM),
    **dict.fromkeys(("gemma3n_text", "gemma4_text"), _STREAMS),
}
"""Reasons for well-known architectures that have no exact conversion."""


def register(entry: Architecture) -> None:
    """Adds an entry. Raises ValueError if its model type has one."""
    if entry.model_type in ARCHITECTURES:
        raise ValueError(f"architecture {entry.model_type!r} is already registered")
    ARCHITECTURES[entry.model_type] = entry


def check_config(config: Any) -> None:
    """Raises UsageError for the config of a model that was trained with attention over depth of which the class that
    transformers has for it knows nothing: it would compute plain residual sums without a word."""
    text = config.get_text_config()
    for name, value in vars(text).items():
        if name.startswith("attn_res_") and value and not hasattr(type(text), name):
            raise UsageError(
                f"the config has {name}={value!r}, so the model was trained with attention over depth, and "
                f"transformers' {text.model_type!r} has none; take a version of transformers or code that computes it"
            )


def find(base: Any) -> Architecture:
    """The entry of a transformers base model (the one without a head), checked against the modules that it has.

    Raises UsageError with the reason if the model cannot be converted exactly.
    """
    check_config(base.config)
    model_type = base.config.model_type.removeprefix(TYPE_PREFIX)
    if getattr(base.config, "is_encoder_decoder", False):
        raise UsageError(f"architecture {model_type!r} is an encoder-decoder; only decoders can be converted")
    if model_type in NOT_EXACT:
        raise UsageError(f"architecture {model_type!r} cannot be converted exactly: {NOT_EXACT[model_type]}")
    if model_type not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise UsageError(f"architecture {model_type!r} is not in the table of attnres.hf.convert.table; known: {known}")
    entry = ARCHITECTURES[model_type]
    for name in (entry.layers, entry.final_norm):
        if not isinstance(getattr(base, name, None), nn.Module):
            raise UsageError(f"{type(base).__name__} has no module {name!r}, unlike other {model_type!r} base models")
    _check_layers(entry, list(getattr(base, entry.layers)), base.config.num_hidden_layers)
    return entry


def _check_layers(entry: Architecture, layers: list[nn.Module], expected: int) -> None:
    if len(layers) != expected:
        raise UsageError(f"the model has {len(layers)} decoder layers but its config says num_hidden_layers={expected}")
    for i, layer in enumerate(layers):
        place = f"decoder layer {i}, a {type(layer).__name__},"
        if type(layer).__name__ != entry.decoder_layer or not type(layer).__module__.startswith("transformers."):
            raise UsageError(f"{place} is not the {entry.decoder_layer} of transformers, so its forward is not known")
        if "forward" in vars(layer):
            raise UsageError(f"{place} has had its forward replaced; convert the model before that is done")
        children = {name for name, _ in layer.named_children()}
        if extra := sorted(children - entry.submodules(layer)):
            raise UsageError(f"{place} has {', '.join(extra)}, which an exact conversion does not know how to treat")
        if missing := sorted(entry.submodules(layer) - children):
            raise UsageError(f"{place} lacks {', '.join(missing)}, which an exact conversion needs to find")
        check_sum(layer, entry, place)


_GEMMA2 = Architecture(
    "gemma2",
    "Gemma2DecoderLayer",
    after_attention=("post_attention_layernorm",),
    mlp_norm="pre_feedforward_layernorm",
    after_mlp=("post_feedforward_layernorm",),
)
_OLMO2 = replace(_GEMMA2, model_type="olmo2", decoder_layer="Olmo2DecoderLayer", attention_norm=None, mlp_norm=None)

for _entry in (
    Architecture("cohere", "CohereDecoderLayer", mlp_norm="input_layernorm", parallel=True),
    Architecture("deepseek_v2", "DeepseekV2DecoderLayer"),
    Architecture("deepseek_v3", "DeepseekV3DecoderLayer"),
    Architecture("gemma", "GemmaDecoderLayer"),
    _GEMMA2,
    replace(_GEMMA2, model_type="gemma3_text", decoder_layer="Gemma3DecoderLayer"),
    Architecture("glm4_moe", "Glm4MoeDecoderLayer"),
    Architecture(
        "gpt2",
        "GPT2Block",
        layers="h",
        final_norm="ln_f",
        attention="attn",
        attention_norm="ln_1",
        mlp_norm="ln_2",
        refused_arguments=("encoder_hidden_states", "encoder_attention_mask"),
    ),
    Architecture(
        "gpt_neox",
        "GPTNeoXLayer",
        final_norm="final_layer_norm",
        attention="attention",
        after_attention=("post_attention_dropout",),
        after_mlp=("post_mlp_dropout",),
        parallel="use_parallel_residual",
    ),
    Architecture("gpt_oss", "GptOssDecoderLayer"),
    Architecture("granite", "GraniteDecoderLayer", multiplier="residual_multiplier"),
    Architecture("granitemoe", "GraniteMoeDecoderLayer", mlp="block_sparse_moe", multiplier="residual_multiplier"),
    Architecture("kimi_linear", "KimiLinearDecoderLayer"),
    Architecture("llama", "LlamaDecoderLayer"),
    Architecture("mistral", "MistralDecoderLayer"),
    Architecture("mixtral", "MixtralDecoderLayer"),
    Architecture("olmo", "OlmoDecoderLayer"),
    _OLMO2,
    replace(_OLMO2, model_type="olmo3", decoder_layer="Olmo3DecoderLayer"),
    Architecture("olmoe", "OlmoeDecoderLayer"),
    Architecture(
        "phi",
        "PhiDecoderLayer",
        final_norm="final_layernorm",
        after_attention=("resid_dropout",),
        mlp_norm="input_layernorm",
        after_mlp=("resid_dropout",),
        parallel=True,
    ),
    Architecture("phi3", "Phi3DecoderLayer", after_attention=("resid_attn_dropout",), after_mlp=("resid_mlp_dropout",)),
    Architecture("qwen2", "Qwen2DecoderLayer"),
    Architecture("qwen2_moe", "Qwen2MoeDecoderLayer"),
    Architecture("qwen3", "Qwen3DecoderLayer"),
    Architecture("qwen3_moe", "Qwen3MoeDecoderLayer"),
    Architecture("qwen3_next", "Qwen3NextDecoderLayer", linear_attention="linear_attn"),
    Architecture("seed_oss", "SeedOssDecoderLayer"),
    Architecture("smollm3", "SmolLM3DecoderLayer"),
    Architecture("starcoder2", "Starcoder2DecoderLayer"),
):
    register(_entry)
