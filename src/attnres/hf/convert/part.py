"""A model that is part of another one, which saves it: the outer config must say that it is converted."""

import gc
from collections.abc import Iterator
from typing import Any, NamedTuple

from transformers import PreTrainedConfig, PreTrainedModel

from ...errors import UsageError


class Place(NamedTuple):
    """Where the config of a part stands in that of the whole."""

    config: Any
    name: str


def places_in_outer_configs(model: Any) -> list[Place]:
    """Where the models around `model`, such as one for images and text, keep what they build it from.

    Raises UsageError if one of them has no config of its own for it, and so would save and load it unconverted.
    """
    places = []
    for outer in _models_around(model):
        found = [] if outer.config is model.config else list(_same_kind(outer.config, model.config))
        if len(found) != 1:
            whole = type(outer).__name__
            mend = f"convert the {whole}" if not found else "convert it before it is put there"
            raise UsageError(
                f"the {type(model).__name__} is part of a {whole}, which would save it as a plain one; {mend}"
            )
        places += found
    return places


def models_with(config: Any) -> list[Any]:
    """All live models of one config."""
    return [model for model in _living() if model.config is config]


def _living() -> list[Any]:
    models = [it for it in gc.get_objects() if issubclass(type(it), PreTrainedModel)]
    return [it for it in models if "_modules" in vars(it)]  # not half of one, which a failed copy leaves


def _models_around(model: Any) -> list[Any]:
    # a module has no link to what it is part of, so all live models are searched
    if _holders(model):
        gc.collect()  # perhaps nothing refers to the outer model any more
    return _holders(model)


def _holders(model: Any) -> list[Any]:
    return [it for it in _living() if it is not model and any(module is model for module in it.modules())]


def _same_kind(config: Any, part: Any) -> Iterator[Place]:
    for name, value in vars(config).items():
        if value is part or type(value) is type(part):
            yield Place(config, name)
        elif isinstance(value, PreTrainedConfig):
            yield from _same_kind(value, part)
