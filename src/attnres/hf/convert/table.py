"""The architectures that can be converted exactly, as a table: how each one's decoder layers treat the residual stream.

An exact conversion needs a stream that is a plain sum: every sublayer reads it (through a norm or not), and what it
adds is never rescaled afterwards. An entry names the submodules of a decoder layer and their order; a type whose layers
are not all alike has an entry for each kind. Every layer is run against its entry (`layer_sum`), so that a wrong entry
is refused. A type without an entry takes that of another type which describes its layers, and is then verified.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ...errors import UsageError
from .layer_sum import NotThisSum, check_own, check_sum


@dataclass(frozen=True)
class Architecture:
    """How one decoder layer computes. Fields are names of submodules or attributes, of the decoder layer unless said
    otherwise; those of Llama are the defaults.

    Attention runs `attention(attention_norm(h))` through each of `after_attention` and the MLP `mlp(mlp_norm(h))`
    through each of `after_mlp`; what each adds to the stream is multiplied by `multiplier` if there is one.
    """

    model_type: str
    """`config.model_type` of the base model."""
    layers: str = "layers"
    """The base model's list of decoder layers, dotted where it is further in."""
    final_norm: str = "norm"
    """The base model's norm in front of the output head."""
    attention: str = "self_attn"
    """Or what stands in its place: linear attention, a recurrence, a convolution."""
    attention_norm: str | None = "input_layernorm"
    """None: attention reads the stream as it is."""
    after_attention: tuple[str, ...] = ()
    """Norms, dropouts and projections on the way from attention to the stream."""
    mlp: str = "mlp"
    mlp_norm: str | None = "post_attention_layernorm"
    after_mlp: tuple[str, ...] = ()
    beside_mlp: str | None = None
    """A second MLP on the same input, whose output is added to the first's."""
    multiplier: str | None = None
    """Attribute that holds the factor on everything added to the stream."""
    parallel: bool = False
    """Whether attention and MLP read the same stream and are added together."""
    adds_itself: tuple[str, ...] = ()
    """Which of attention and MLP take the stream as `residual` and return the sum."""
    renamed: tuple[tuple[str, str], ...] = ()
    """Arguments that the decoder layer hands to attention under another name: (its own, attention's)."""
    refused_arguments: tuple[str, ...] = ()
    """Arguments of the decoder layer that must be None, because they ask for sublayers that are not described here."""
    outputs: int = 0
    """How many values the layer returns in a tuple, 0 for the stream alone; `find` fills it in."""

    @property
    def submodules(self) -> set[str]:
        """The submodules that a decoder layer must have, and no others."""
        names = (self.attention, self.attention_norm, self.mlp, self.mlp_norm, self.beside_mlp)
        return {name for name in (*names, *self.after_attention, *self.after_mlp) if name is not None}


TYPE_PREFIX = "attnres_"
"""Of the model type of a converted model."""

ARCHITECTURES: dict[str, tuple[Architecture, ...]] = {}
"""Entries by model type, one for each kind of decoder layer."""

_POST_NORM = "it normalises the stream itself after every sum, so that no read of separate outputs equals it"
_STREAMS = "it keeps several residual streams or rescales the stream, so that it is not a plain sum of outputs"
_BETWEEN = "what is added to the stream between its decoder layers is part of none of them"
NOT_EXACT: dict[str, str] = {
    **dict.fromkeys(("albert", "bert", "distilbert", "electra", "roberta", "xlm-roberta", "openai-gpt"), _POST_NORM),
    **dict.fromkeys(("gemma3n_text", "gemma4_text", "gemma4_unified_text", "minimax", "doge", "beam"), _STREAMS),
    **dict.fromkeys(("qwen3_vl_text", "qwen3_vl_moe_text"), f"{_BETWEEN} (deepstack features of images)"),
}
"""Reasons for well-known architectures that have no exact conversion."""


def register(*entries: Architecture) -> None:
    """Adds the entries of one model type, one for each kind of decoder layer that it has. Conversions with them are
    verified unless `convert` is told otherwise. Raises ValueError if the type has entries."""
    (model_type,) = {entry.model_type for entry in entries}
    if model_type in ARCHITECTURES:
        raise ValueError(f"architecture {model_type!r} is already registered")
    ARCHITECTURES[model_type] = entries


def is_proven(base: Any) -> bool:
    """Whether the type of a base model has entries of this table, which our tests prove, and none of users'."""
    model_type = _type_of(base)
    return model_type in _PROVEN and ARCHITECTURES.get(model_type) is _PROVEN[model_type]


def _type_of(base: Any) -> str:
    return str(base.config.model_type.removeprefix(TYPE_PREFIX))


def check_config(config: Any) -> None:
    """Raises UsageError for the config of a model that was trained with attention over depth of which the class that
    transformers has for it knows nothing: it would compute plain residual sums without a word."""
    text = config.get_text_config()
    for name, value in vars(text).items():
        if name.startswith("attn_res_") and value and not hasattr(type(text), name):
            mend = "take a version of transformers or code that computes it"
            if text.model_type == "kimi_linear":
                mend = "give the folder that it is in to attnres.hf.load, which reads Kimi K3's layout"
            raise UsageError(
                f"the config has {name}={value!r}, so the model was trained with attention over depth, and "
                f"transformers' {text.model_type!r} has none; {mend}"
            )


def find(base: Any) -> tuple[Architecture, ...]:
    """The entry of each decoder layer of a transformers base model (the one without a head), with what it returns.

    Raises UsageError with the reason if the model cannot be converted exactly.
    """
    check_config(base.config)
    model_type = _type_of(base)
    if getattr(base.config, "is_encoder_decoder", False):
        raise UsageError(f"architecture {model_type!r} is an encoder-decoder; only decoders can be converted")
    if model_type in NOT_EXACT:
        raise UsageError(f"architecture {model_type!r} cannot be converted exactly: {NOT_EXACT[model_type]}")
    known = ARCHITECTURES.get(model_type)
    entries = tuple(shape for shape in known or _shapes(model_type) if _has(base, shape.layers, shape.final_norm))
    if not entries and known:
        lacking = next(name for name in (known[0].layers, known[0].final_norm) if not _has(base, name))
        raise UsageError(f"{type(base).__name__} has no module {lacking!r}, unlike other {model_type!r} base models")
    try:
        return _entries_of(base, entries)
    except UsageError as error:
        if known:
            raise
        if inner := _language_model(base):
            raise UsageError(f"architecture {model_type!r} is made of several models; convert its {inner}") from error
        raise UsageError(
            f"architecture {model_type!r} is not in the table of attnres.hf.convert.table and like none that is "
            f"there{_nearest(base)}: {error}; if its stream is a plain sum, register(Architecture({model_type!r}, ..)) "
            f"says how"
        ) from error


def _nearest(base: Any) -> str:
    """The type of the table whose layers have most names in common with those of a base model, in words."""
    best = ("", 0)
    for entry in (entry for entries in ARCHITECTURES.values() for entry in entries):
        layers = base.get_submodule(entry.layers) if _has(base, entry.layers) else None
        if isinstance(layers, nn.ModuleList) and len(layers):
            common = len(entry.submodules & {name for name, _ in layers[0].named_children()})
            best = max(best, (entry.model_type, common), key=lambda pair: pair[1])
    return f" (the nearest is {best[0]!r})" if best[1] else ""


def _language_model(base: Any) -> str | None:
    """The first of the models within a base model that the table has, in words."""
    for name, module in base.named_modules():
        model_type = getattr(getattr(module, "config", None), "model_type", None)
        if name and isinstance(module, PreTrainedModel) and model_type in ARCHITECTURES:
            return f"{name}, a {type(module).__name__} of type {model_type!r}"
    return None


def layers_of(base: Any, entries: Sequence[Architecture]) -> list[nn.Module]:
    """The decoder layers of a base model with these entries."""
    return list(base.get_submodule(entries[0].layers))


def _has(base: Any, *names: str) -> bool:
    try:
        return all(isinstance(base.get_submodule(name), nn.Module) for name in names)
    except AttributeError:
        return False


def _shapes(model_type: str) -> list[Architecture]:
    """Every entry of the table without its type, under this one, Llama's and its like first."""
    shapes = dict.fromkeys(replace(entry, model_type="") for entries in ARCHITECTURES.values() for entry in entries)
    return [replace(shape, model_type=model_type) for shape in sorted(shapes, key=lambda s: s != Architecture(""))]


def _entries_of(base: Any, entries: tuple[Architecture, ...]) -> tuple[Architecture, ...]:
    if not entries:
        raise UsageError(f"the {type(base).__name__} has no decoder layers or no final norm where others have theirs")
    layers, expected = layers_of(base, entries), base.config.num_hidden_layers
    entries = tuple(entry for entry in entries if entry.layers == entries[0].layers)
    if len(layers) != expected:
        raise UsageError(f"the model has {len(layers)} decoder layers but its config says num_hidden_layers={expected}")
    return tuple(_entry_of(layer, entries, i) for i, layer in enumerate(layers))


def _entry_of(layer: nn.Module, entries: tuple[Architecture, ...], index: int) -> Architecture:
    """The first entry that describes the layer. Raises UsageError saying how far the nearest is from it."""
    place = f"decoder layer {index}, a {type(layer).__name__},"
    if not type(layer).__module__.startswith("transformers."):
        raise UsageError(f"{place} is none of transformers' own, so its forward is not known")
    if "forward" in vars(layer):
        raise UsageError(f"{place} has had its forward replaced; convert the model before that is done")
    children = {name for name, _ in layer.named_children()}
    fitting = [entry for entry in entries if entry.submodules == children]
    if not fitting:
        nearest = min(entries, key=lambda entry: len(entry.submodules ^ children))
        if extra := sorted(children - nearest.submodules):
            raise UsageError(f"{place} has {', '.join(extra)}, which an exact conversion does not know how to treat")
        missing = sorted(nearest.submodules - children)
        raise UsageError(f"{place} lacks {', '.join(missing)}, which an exact conversion needs to find")
    check_own(layer, place)
    refusal = None
    for entry in fitting:
        try:
            return replace(entry, outputs=check_sum(layer, entry, place))
        except NotThisSum as error:
            refusal = refusal or error
    assert refusal is not None
    raise refusal


_GEMMA2 = Architecture(
    "gemma2",
    after_attention=("post_attention_layernorm",),
    mlp_norm="pre_feedforward_layernorm",
    after_mlp=("post_feedforward_layernorm",),
)
_OLMO2 = replace(_GEMMA2, model_type="olmo2", attention_norm=None, mlp_norm=None)
_GPT2 = Architecture("gpt2", "h", "ln_f", "attn", "ln_1", mlp_norm="ln_2")
_CROSS = ("encoder_hidden_states", "encoder_attention_mask")
_GLM4 = Architecture("glm4", after_attention=("post_self_attn_layernorm",), after_mlp=("post_mlp_layernorm",))
_COHERE = Architecture("cohere", mlp_norm="input_layernorm", parallel=True)
_GRANITE = Architecture("granite", multiplier="residual_multiplier")
_GRANITEMOE = replace(_GRANITE, model_type="granitemoe", mlp="block_sparse_moe")
_DROPPED = Architecture("emu3_text_model", after_attention=("dropout",), after_mlp=("dropout",))
_NEOX = Architecture(
    "gpt_neox",
    final_norm="final_layer_norm",
    attention="attention",
    after_attention=("post_attention_dropout",),
    after_mlp=("post_mlp_dropout",),
)
_STABLELM = Architecture("stablelm", after_mlp=("dropout",))
_LFM2 = Architecture(
    "lfm2", final_norm="embedding_norm", attention_norm="operator_norm", mlp="feed_forward", mlp_norm="ffn_norm"
)
_FALCON = Architecture("falcon", "h", "ln_f", "self_attention")
_MPT = Architecture(
    "mpt",
    "blocks",
    "norm_f",
    "attn",
    "norm_1",
    ("resid_attn_dropout",),
    "ffn",
    "norm_2",
    adds_itself=("ffn",),
    renamed=(("layer_past", "past_key_values"),),
)


_OPT = Architecture(
    "opt",
    "decoder.layers",
    "decoder.final_layer_norm",
    attention_norm="self_attn_layer_norm",
    mlp="fc1",
    mlp_norm="final_layer_norm",
    after_mlp=("activation_fn", "fc2"),
)


def _kinds(entry: Architecture, *attentions: str) -> tuple[Architecture, ...]:
    """The entry, and one for each other submodule that stands in the place of its attention in some layers."""
    return entry, *(replace(entry, attention=attention) for attention in attentions)


_LIKE_LLAMA = (
    "arcee aria_text axk1 axk2 bailing_hybrid bitnet cwm deepseek_v2 deepseek_v3 deepseek_v32 diffllama dots1 "
    "dots3_note_text ernie4_5 ernie4_5_moe exaone_moe flint gemma glm glm4_moe glm4_moe_lite glm_moe_dsa gpt_oss "
    "helium hunyuan_v1_dense hunyuan_v1_moe hy_v3 jais2 kimi_linear laguna llama mellum mimo_v2_flash minimax_m2 "
    "minimax_m3_vl_text ministral ministral3 mistral mixtral moshi nanochat olmo olmoe phimoe qwen2 qwen2_5_vl_text "
    "qwen2_moe qwen2_vl_text qwen3 qwen3_moe seed_oss smollm3 solar_open starcoder2 youtu "
)
for _name in _LIKE_LLAMA.split():
    register(Architecture(_name))
for _row in (
    *((replace(_GRANITE, model_type=name),) for name in ("granite", "granite_swa")),
    *((replace(_GRANITEMOE, model_type=name),) for name in ("granitemoe", "granitemoe_swa")),
    *((replace(_GEMMA2, model_type=name),) for name in ("gemma2", "gemma3_text")),
    *((replace(_OLMO2, model_type=name),) for name in ("olmo2", "olmo3", "exaone4", "flex_olmo")),
    *((replace(_GLM4, model_type=name),) for name in ("glm4", "kolibri1")),
    *((replace(_COHERE, model_type=name),) for name in ("cohere", "cohere2", "cohere2_moe", "cohere_compass_text")),
    *(_kinds(Architecture(name), "linear_attn") for name in ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")),
    _kinds(_LFM2, "conv"),
    _kinds(replace(_LFM2, model_type="lfm2_moe"), "conv"),
    _kinds(
        replace(_LFM2, model_type="lfm3", after_attention=("post_operator_norm",), after_mlp=("post_ffn_norm",)), "conv"
    ),
    *(
        _kinds(
            Architecture(name, final_norm="final_layernorm", mlp="feed_forward", mlp_norm="pre_ff_layernorm"), "mamba"
        )
        for name in ("bamba", "jamba")
    ),
    (
        *_kinds(replace(_GRANITEMOE, model_type="granitemoehybrid", beside_mlp="shared_mlp"), "mamba"),
        *_kinds(replace(_GRANITE, model_type="granitemoehybrid", mlp="shared_mlp"), "mamba"),
    ),
    (Architecture("olmo_hybrid", attention="linear_attn"), replace(_OLMO2, model_type="olmo_hybrid")),
    (replace(_GEMMA2, model_type="afmoe", mlp_norm="pre_mlp_layernorm", after_mlp=("post_mlp_layernorm",)),),
    (Architecture("apertus", attention_norm="attention_layernorm", mlp_norm="feedforward_layernorm"),),
    (replace(_GRANITE, model_type="hyperclovax", after_attention=("post_norm1",), after_mlp=("post_norm2",)),),
    (replace(_GRANITE, model_type="minicpm3", multiplier="residual_scale"),),
    (
        replace(_GRANITEMOE, model_type="granitemoeshared", beside_mlp="shared_mlp"),
        replace(_GRANITEMOE, model_type="granitemoeshared"),
    ),
    (Architecture("jetmoe", attention="self_attention"),),
    (Architecture("llama4_text", mlp="feed_forward"),),
    (Architecture("vaultgemma", mlp_norm="pre_feedforward_layernorm"),),
    (_DROPPED,),
    (
        Architecture(
            "modernbert-decoder",
            final_norm="final_norm",
            attention="attn",
            attention_norm="attn_norm",
            mlp_norm="mlp_norm",
        ),
    ),
    (replace(_STABLELM, model_type="persimmon", final_norm="final_layernorm"),),
    (replace(_STABLELM, mlp_norm="input_layernorm", parallel=True), _STABLELM),
    (
        Architecture(
            "phi",
            final_norm="final_layernorm",
            after_attention=("resid_dropout",),
            mlp_norm="input_layernorm",
            after_mlp=("resid_dropout",),
            parallel=True,
        ),
    ),
    (Architecture("phi3", after_attention=("resid_attn_dropout",), after_mlp=("resid_mlp_dropout",)),),
    (Architecture("nemotron"),),
    (replace(_NEOX, parallel=True), _NEOX),
    *((replace(_GPT2, model_type=name, refused_arguments=_CROSS),) for name in ("gpt2", "gpt_bigcode", "gpt_neo")),
    *((replace(_GPT2, model_type=name, mlp_norm="ln_1", parallel=True),) for name in ("gptj", "codegen")),
    (replace(_FALCON, model_type="bloom", adds_itself=("self_attention", "mlp")),),
    (
        replace(_FALCON, attention_norm="ln_attn", mlp_norm="ln_mlp", parallel=True),
        replace(_FALCON, mlp_norm="input_layernorm", parallel=True),
        _FALCON,
    ),
    (_MPT,),
    (_OPT,),
    (replace(_OPT, model_type="biogpt", layers="layers", final_norm="layer_norm"),),
    (
        Architecture(
            "recurrent_gemma",
            final_norm="final_norm",
            attention="temporal_block",
            attention_norm="temporal_pre_norm",
            mlp="mlp_block",
            mlp_norm="channel_pre_norm",
        ),
    ),
):
    register(*_row)
_PROVEN = dict(ARCHITECTURES)
