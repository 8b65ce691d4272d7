"""Mechanisms by name. A new one is one file in this folder and one `register` line."""

import difflib
import inspect
import typing
from collections.abc import Callable
from typing import Any, TypeVar

from ..errors import UsageError
from .base import Residual

_classes: dict[str, type[Residual]] = {}
C = TypeVar("C", bound=type[Residual])


def register(name: str) -> Callable[[C], C]:
    """Class decorator that enters a mechanism under `name`. Raises ValueError if the name is taken."""

    def enter(cls: C) -> C:
        if name in _classes:
            raise ValueError(f"residual {name!r} is already registered, by {_classes[name].__qualname__}")
        _classes[name] = cls
        return cls

    return enter


def names() -> list[str]:
    """Every registered mechanism, in the order of registration."""
    return list(_classes)


def get(name: str) -> type[Residual]:
    """The class of a mechanism. Raises UsageError with the nearest name for an unknown one."""
    if name not in _classes:
        near = difflib.get_close_matches(str(name), _classes, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UsageError(f"residual {name!r} is unknown; {hint}known: {', '.join(_classes)}")
    return _classes[name]


def build(name: str, dim: int, num_layers: int, **options: Any) -> Residual:
    """Builds the mechanism `name` for a network of `num_layers` layers (attention and MLP each count) of width `dim`.

    Raises UsageError for an unknown name (the nearest one is suggested), an unknown option or a bad value.
    """
    cls = get(name)
    for option in options:
        _check_option(name, option)
    return cls(dim, num_layers, **options)


def named(text: str) -> tuple[str, dict[str, Any]]:
    """(mechanism, options) of a name with options behind it, such as "block_attnres:num_blocks=4:reads=mlp".

    Raises UsageError for an unknown name or option, and for a value that is none of the option's types.
    """
    name, *written = text.split(":")
    hints = typing.get_type_hints(get(name).__init__)
    options: dict[str, Any] = {}
    for part in written:
        option, equals, value = part.partition("=")
        if not equals or option in options:
            raise UsageError(f"{text!r} must be a name and options, each once, as in {name}:option=value; see {part!r}")
        _check_option(name, option)
        options[option] = _value(text, option, hints[option], value)
    return name, options


def _check_option(name: str, option: str) -> None:
    known = [p for p in inspect.signature(get(name).__init__).parameters if p not in ("self", "dim", "num_layers")]
    if option not in known:
        takes = f"it takes {', '.join(known)}" if known else "it takes none"
        raise UsageError(f"residual {name!r} has no option {option!r}; {takes}")


def _value(text: str, option: str, hint: Any, value: str) -> Any:
    types = typing.get_args(hint) or (hint,)
    words: dict[str, Any] = {"None": None} if type(None) in types else {}
    words |= {"True": True, "False": False} if bool in types else {}
    if value in words:
        return words[value]
    for kind in (int, float, str):
        try:
            if kind in types:
                return kind(value)
        except ValueError:
            continue
    wanted = " or ".join(getattr(kind, "__name__", str(kind)).replace("NoneType", "None") for kind in types)
    raise UsageError(f"{option} in {text!r} must be {wanted}; it is {value!r}")
