"""Models around a converted one whose classes make their parts of fixed classes, such as Gemma 3 and Qwen2-VL.

Saved as they are they would load with a plain language model, without a word. So they too become classes of their own,
with a model type of their own: `AttnResGemma3ForConditionalGeneration`, "attnres_gemma3".
"""

from typing import Any

from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

from ...errors import UsageError
from ..remote_code import saving
from .classes import AUTO_CLASSES, CLASS_PREFIX, made_for, publish_config, publish_model, upgrade
from .part import Place, models_with
from .surgery import once_a_class
from .table import TYPE_PREFIX

PART = "text_config"
"""Where such configs keep that of their language model."""
WHOLES = ("gemma3", "qwen2_vl", "qwen2_5_vl")
"""Model types that the Auto classes know from the start; others of this kind are known once such a config is read."""


def __getattr__(name: str) -> Any:
    """The class of that name: pickle looks for it here, in processes that have not made it yet."""
    return made_for(name, __name__, whole_config_class, whole_model_class)


def has_fixed_part(config_class: Any) -> bool:
    """Whether a config class makes its language model's config of one class, whatever model type that says."""
    specification = getattr(config_class, "sub_configs_defaults", None) or config_class.sub_configs
    found = specification.get(PART)
    found = getattr(found, "config_class", found)
    return found is not None and found is not AutoConfig


def rebuild_whole(place: Place) -> None:
    """Gives the models of a config whose part is converted their classes, if theirs make it a plain one."""
    config = place.config
    if place.name != PART or not has_fixed_part(type(config)) or type(config).__name__.startswith(CLASS_PREFIX):
        return
    for model in models_with(config):
        model.__class__ = whole_model_class(type(model))
    config.__class__ = whole_config_class(type(config))


@once_a_class
def whole_config_class(original: Any) -> Any:
    """The config class of models whose language model is converted. Such a class is its own."""
    if original.__name__.startswith(CLASS_PREFIX):
        return original

    def __post_init__(self: Any, **kwargs: Any) -> None:
        given = getattr(self, PART)
        if isinstance(given, dict):
            setattr(self, PART, AutoConfig.for_model(**given))
        register_wholes(type(self))
        original.__post_init__(self, **kwargs)

    def __setstate__(self: Any, state: dict[str, Any]) -> None:
        vars(self).update(state)
        register_wholes(type(self))

    body = {
        "__module__": __name__,
        "__setstate__": __setstate__,
        "__doc__": f"A {original.__name__} whose language model has Attention Residuals.",
        "__post_init__": __post_init__,
        "model_type": TYPE_PREFIX + original.model_type,
        "original": original,
    }
    converted: Any = type(CLASS_PREFIX + original.__name__, (original,), body)
    globals()[converted.__name__] = converted
    publish_config(converted, original)
    return converted


@once_a_class
def whole_model_class(original: Any) -> Any:
    """The class of a model around a converted one. Such a class is its own."""
    if original.__name__.startswith(CLASS_PREFIX):
        return original

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        original.__init__(self, config, *args, **kwargs)
        for module in list(self.modules()):
            if isinstance(module, PreTrainedModel) and module.config is getattr(config, PART):
                upgrade(module)

    body = {
        "__module__": __name__,
        "__doc__": f"A {original.__name__} around a language model with Attention Residuals.",
        "__init__": __init__,
        "save_pretrained": saving(original.save_pretrained, refuse_code),
        "config_class": whole_config_class(original.config_class),
        "original": original,
    }
    converted = type(CLASS_PREFIX + original.__name__, (original,), body)
    globals()[converted.__name__] = converted
    publish_model(converted, original)
    return converted


def refuse_code(model: Any) -> dict[str, str]:
    """`remote_code.Names` of such a model: it has none."""
    raise UsageError(
        f"remote_code=True is for language models; a {type(model).__name__} needs attnres where it is loaded"
    )


@once_a_class
def register_wholes(config_class: Any) -> None:
    """Makes the Auto classes know the models of one such config class."""
    for auto_class in (*AUTO_CLASSES, AutoModelForImageTextToText):
        original = auto_class._model_mapping.get(config_class.original, None)
        if isinstance(original, type):
            auto_class.register(config_class, whole_model_class(original), exist_ok=True)
