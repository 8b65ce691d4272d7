"""Mechanisms by name. A new one is one file in this folder and one `register` line."""

import difflib
import inspect
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
    known = [p for p in inspect.signature(cls.__init__).parameters if p not in ("self", "dim", "num_layers")]
    for option in options:
        if option not in known:
            takes = f"it takes {', '.join(known)}" if known else "it takes none"
            raise UsageError(f"residual {name!r} has no option {option!r}; {takes}")
    return cls(dim, num_layers, **options)
