"""Converted configuration and model classes, one for each original, and their entry in transformers' Auto classes.

A converted `LlamaForCausalLM` is an `AttnResLlamaForCausalLM`, a subclass, whose config has the model type
"attnres_llama". The type is a new one on purpose: a reader that does not know it fails, where one that took the
folder for a plain Llama would drop the depth attention and compute something else without a word.
"""

import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any

import transformers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
    PreTrainedModel,
    conversion_mapping,
    processing_utils,  # noqa: F401
)
from transformers.models.auto import tokenization_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, model_type_to_module_name
from transformers.utils import output_capturing

from ...errors import UsageError
from ...residual import registry
from ...residual.base import Residual
from ...version import IN_FOLDER
from ..engines import StaysWhole
from ..remote_code import check_class, saving
from ..residual_place import check_verbs
from ..self_speculation import DraftsItself
from ..tensor_parallel import SharesTokens
from . import table
from .checkpointing import non_reentrant
from .packing import with_ends
from .surgery import DepthStream, attach, check_whole, converted_layers, once_a_class
from .table import TYPE_PREFIX, Architecture

CLASS_PREFIX = "AttnRes"
EXACT = ("block_attnres", "full_attnres")
"""Mechanisms that are the plain residual sum at their initial parameters."""

# importing processing_utils puts a new module `transformers` into sys.modules; code that imported it before keeps the
# old one, so both get the classes
_MODULES = (transformers, sys.modules["transformers"])

AUTO_CLASSES = (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)


def __getattr__(name: str) -> Any:
    """The converted class of that name: pickle and peft look for it here, in processes that have not made it yet."""
    return made_for(name, __name__, converted_config_class, converted_model_class)


def made_for(name: str, module: str, of_config: Callable[[Any], Any], of_model: Callable[[Any], Any]) -> Any:
    """What one of two functions makes of the transformers class with this name but for the prefix.

    Raises AttributeError, in the words of a module, if there is none."""
    original = getattr(transformers, name.removeprefix(CLASS_PREFIX), None) if name.startswith(CLASS_PREFIX) else None
    for kind, make in ((PreTrainedConfig, of_config), (PreTrainedModel, of_model)):
        if isinstance(original, type) and issubclass(original, kind):
            return make(original)
    raise AttributeError(f"module {module!r} has no attribute {name!r}")


def is_converted(model: Any) -> bool:
    """Whether a transformers model has been through `attnres.hf.convert`."""
    return model.config.model_type.startswith(TYPE_PREFIX)


def build_residual(base: Any, entries: Sequence[Architecture], name: str, options: dict[str, Any]) -> Residual:
    """The residual connection for a base model: two layers, attention and MLP, for each of its decoder layers.

    Reads have the scale of the plain sum, which makes the conversion exact also for layers that do not normalise what
    they read. Raises UsageError for mechanisms and options that do not start as the plain sum.
    """
    if name not in EXACT:
        registry.get(name)
        raise UsageError(f"residual must be one of {', '.join(EXACT)}, which start as the plain sum; it is {name!r}")
    if not options.get("stream_scale", True):
        raise UsageError("stream_scale must stay True in a conversion: the model used to read a sum, not a mean")
    if options.get("window") is not None:
        raise UsageError("window must stay None in a conversion: the model used to read all its layers' outputs")
    options = {**options, "stream_scale": True}
    if any(entry.parallel for entry in entries):
        # parallel branches read twice before they write, and the two-phase schedule needs a write after each read
        if options.get("schedule") == "two_phase":
            raise UsageError("schedule must not be 'two_phase' for a model whose attention and MLP run in parallel")
        if options.get("schedule") in (None, "auto"):
            options["schedule"] = "layerwise"
    return registry.build(name, base.config.hidden_size, 2 * len(entries), **options)


@once_a_class
def converted_config_class(original: Any) -> Any:
    """The config class with two fields more: the mechanism's name and its options."""

    def __post_init__(self: Any, **kwargs: Any) -> None:
        self.residual_options = dict(self.residual_options or {})
        register_models(type(self))
        original.__post_init__(self, **kwargs)

    def __setstate__(self: Any, state: dict[str, Any]) -> None:
        vars(self).update(state)
        register_models(type(self))  # an engine's worker gets the config pickled, and looks for its model

    body = {
        "__module__": __name__,
        "__doc__": f"A {original.__name__} whose model has Attention Residuals.",
        "__setstate__": __setstate__,
        "__annotations__": {"residual": str, "residual_options": dict[str, Any] | None},
        "__post_init__": __post_init__,
        "model_type": TYPE_PREFIX + original.model_type,
        "original": original,
        # engines that split a model into stages hand on hidden states; here the next stage needs the whole state
        "base_model_pp_plan": None,
        "residual": "block_attnres",
        "residual_options": None,
    }
    converted: Any = type(CLASS_PREFIX + original.__name__, (original,), body)
    globals()[converted.__name__] = converted  # where pickle looks for it, when an engine sends it to its workers
    publish_config(converted, original)
    return converted


def announce(model_type: str, module: Any) -> None:
    """Has AutoConfig find the converted form of a type in a module, which makes the class when it is first asked for:
    to make all of them would import all their originals."""
    converted, names = TYPE_PREFIX + model_type, CONFIG_MAPPING._mapping
    if model_type in names:
        names[converted] = CLASS_PREFIX + names[model_type]
        CONFIG_MAPPING._modules[model_type_to_module_name(converted)] = module
        _share_tokenizer(model_type, converted)


def publish_config(converted: Any, original: Any) -> None:
    """Makes AutoConfig know a converted config class, and what transformers knows of the original by its type."""
    if not IN_FOLDER:  # code that a folder carries is for that folder
        AutoConfig.register(converted.model_type, converted, exist_ok=True)
    _share_checkpoint_layout(original.model_type, converted.model_type)
    _share_tokenizer(original.model_type, converted.model_type)


@once_a_class
def converted_model_class(original: Any) -> Any:
    """The model class, with or without a head, that builds or loads converted models. A converted class is its own."""
    if original.__name__.startswith(CLASS_PREFIX):
        return original

    @functools.wraps(original.__init__)  # vLLM compares what it gives with the annotations
    def __init__(self: Any, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        original.__init__(self, config, *args, **kwargs)
        upgrade(self)

    names = tuple(inspect.signature(original.forward).parameters)[1:]

    @functools.wraps(original.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.base_model is self:
            check_verbs(self.residual)
            check_whole(self)
            args, kwargs = (), with_ends(self.config, {**dict(zip(names, args, strict=False)), **kwargs})
        outputs = original.forward(self, *args, **kwargs)
        return _read_streams(outputs, self.residual) if self.base_model is self else outputs

    def _init_weights(self: Any, module: nn.Module) -> None:
        if isinstance(module, Residual):
            module.reset_parameters()
        else:
            original._init_weights(self, module)

    @functools.wraps(original._set_gradient_checkpointing)
    def _set_gradient_checkpointing(self: Any, enable: bool = True, *args: Any, **kwargs: Any) -> None:
        function = args[0] if args else kwargs.get("gradient_checkpointing_func")
        if enable and function is not None:
            non_reentrant(function)  # refused before the first layer has changed
        original._set_gradient_checkpointing(self, enable, *args, **kwargs)

    def sublayers(self: Any) -> list[nn.Module]:
        found = ((layer, layer.architecture) for layer in converted_layers(self))
        names = ((layer, name) for layer, entry in found for name in (entry.attention, entry.mlp, entry.beside_mlp))
        return [getattr(layer, name) for layer, name in names if name is not None]

    body = {
        "__module__": __name__,
        "__doc__": f"A {original.__name__} with Attention Residuals in the place of its residual sums.",
        "__init__": __init__,
        "forward": forward,
        "_init_weights": _init_weights,
        "_set_gradient_checkpointing": _set_gradient_checkpointing,
        "sublayers": sublayers,
        "save_pretrained": saving(original.save_pretrained, names_of),
        "config_class": converted_config_class(original.config_class),
        "original": original,
    }
    generates = (DraftsItself,) if hasattr(original, "generate") else ()
    converted = type(CLASS_PREFIX + original.__name__, (*generates, StaysWhole, SharesTokens, original), body)
    globals()[converted.__name__] = converted
    publish_model(converted, original)
    return converted


def names_of(model: Any) -> dict[str, str]:
    """`remote_code.Names` of a converted model."""
    check_class(model, ["hf.convert.classes"])
    config_class, entries = type(model.config), table.ARCHITECTURES.get(type(model.config).original.model_type)
    if entries is not None and not table.is_proven(base_of(model)):
        raise UsageError("remote_code=True cannot write an architecture that you registered; the folder would lack it")
    found = {auto.__name__: auto._model_mapping.get(config_class.original, None) for auto in AUTO_CLASSES}
    originals = {"AutoConfig": config_class.original, **{auto: kind for auto, kind in found.items() if kind}}
    for kind in (model.original, *originals.values()):
        if getattr(transformers, kind.__name__, None) is not kind:
            raise UsageError(
                f"remote_code=True cannot write the code of {kind.__name__}, which is in {kind.__module__}"
            )
    return {auto: f"hf.convert.classes.{CLASS_PREFIX}{kind.__name__}" for auto, kind in originals.items()}


def publish_model(converted: type, original: Any) -> None:
    """Makes transformers know a converted model class, and of it what it knows of the original by its name."""
    _share_checkpoint_layout(original.__name__, converted.__name__)
    add_to_transformers(converted)
    # transformers does this when it makes an instance, and a model converted in place was made as the original class
    dict.__setitem__(output_capturing._CAN_RECORD_REGISTRY, str(converted), original._can_record_outputs)


def add_to_transformers(model_class: type) -> None:
    """Makes a model class an attribute of transformers, where servers look up what a config's `architectures` names."""
    for module in _MODULES:
        setattr(module, model_class.__name__, model_class)


def base_of(model: Any) -> Any:
    """The model without its head, also where transformers' `base_model` does not find it."""
    base = model.base_model
    if base is model and isinstance(getattr(model, "model", None), PreTrainedModel):
        return model.model
    return base


def upgrade(model: Any) -> None:
    """Puts the residual connection that the config describes into the model and gives it its converted class."""
    base = base_of(model)
    if base is not model.base_model:
        model.base_model_prefix = "model"  # of this instance: `base_model` finds it now
    if not isinstance(getattr(base, "residual", None), Residual):
        config = base.config
        entries = table.find(base)
        attach(base, build_residual(base, entries, config.residual, config.residual_options), entries)
        base.__class__ = converted_model_class(type(base))
    model.__class__ = converted_model_class(type(model))


@once_a_class
def register_models(config_class: Any) -> None:
    """Makes the AutoModel classes know the models of one converted config class.

    Done when the first such config is made, so that importing attnres.hf does not import every model of the table.
    """
    if tokenizer_class := tokenization_auto.TOKENIZER_MAPPING.get(config_class.original, None):
        tokenization_auto.TOKENIZER_MAPPING.register(config_class, tokenizer_class, exist_ok=True)
    for auto_class in AUTO_CLASSES:
        original = auto_class._model_mapping.get(config_class.original, None)
        if isinstance(original, type):
            auto_class.register(config_class, converted_model_class(original), exist_ok=True)


def original_class(name: str, config_class: Any) -> type[PreTrainedModel] | None:
    """The transformers class of which `name` is the converted form, or None."""
    module_name = model_type_to_module_name(config_class.original.model_type)
    module = importlib.import_module(f"transformers.models.{module_name}")
    found = getattr(module, name.removeprefix(CLASS_PREFIX), None)
    return found if name.startswith(CLASS_PREFIX) and isinstance(found, type) else None


def _share_checkpoint_layout(original: str, converted: str) -> None:
    # some models (mixtures of experts) are stored under other names than they compute with: rename the same way
    mapping = conversion_mapping.get_checkpoint_conversion_mapping(original)
    if mapping is not None:
        conversion_mapping.register_checkpoint_conversion_mapping(converted, mapping, overwrite=True)


def _share_tokenizer(original: str, converted: str) -> None:
    # for some model types transformers ignores the tokenizer class that a folder names: ignore it here too
    names = tokenization_auto.TOKENIZER_MAPPING_NAMES
    if original in names:
        names[converted] = names[original]
    if original in tokenization_auto.MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS:
        tokenization_auto.MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS.add(converted)


def _read_streams(outputs: Any, residual: Residual) -> Any:
    """Replaces streams that transformers recorded as hidden states by what the next layer sees of them."""
    if isinstance(outputs, DepthStream):
        return outputs.hidden_states(residual)
    if isinstance(outputs, tuple):
        return tuple(_read_streams(item, residual) for item in outputs)
    if getattr(outputs, "hidden_states", None) is not None:
        outputs.hidden_states = _read_streams(outputs.hidden_states, residual)
    return outputs
