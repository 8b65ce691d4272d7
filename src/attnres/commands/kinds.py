"""How a value is written on a command line or in a file, by the annotation of the field that takes it."""

from __future__ import annotations

import typing
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import reduce
from operator import or_
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union

from ..files import user_path


@dataclass(frozen=True)
class Kind:
    """placeholder: what stands for a value in a help text; wanted: what it is, after "must be"; read: the value that a
    text (with `count`, a list of texts) spells, or a ValueError; count: how many words it takes, None for one."""

    placeholder: str
    wanted: str
    read: Callable[[Any], Any]
    count: int | str | None = None


PLAIN = {
    int: Kind("INT", "a whole number", int),
    float: Kind("FLOAT", "a number", float),
    str: Kind("STR", "a text", str),
    Path: Kind("PATH", "a path", user_path),
}


def kind_of(hint: Any) -> Kind:
    """Of a plain type, a Literal, bool, a tuple, any of these or None, or a class whose `read` takes a text."""
    arguments = typing.get_args(hint)
    if NoneType in arguments:
        inner = kind_of(reduce(or_, (a for a in arguments if a is not NoneType)))
        placeholder = "{None}|" + inner.placeholder
        return Kind(placeholder, f"{inner.wanted} or None", lambda t: None if t == "None" else inner.read(t))
    if typing.get_origin(hint) in (UnionType, Union):
        kinds = [kind_of(a) for a in arguments]
        wanted = " or ".join(kind.wanted for kind in kinds)
        return Kind("|".join(kind.placeholder for kind in kinds), wanted, lambda t: _first(kinds, t))
    if hint is bool or typing.get_origin(hint) is Literal:
        choices = {str(choice): choice for choice in arguments or (True, False)}
        return Kind(f"{{{','.join(choices)}}}", f"one of {', '.join(choices)}", lambda t: _chosen(choices, t))
    if typing.get_origin(hint) is tuple:
        item = kind_of(arguments[0])
        several = item.wanted.removeprefix("a ") + "s"
        if ... in arguments:
            return Kind(item.placeholder, f"{several} separated by commas", lambda t: _items(item, t), "*")
        count = len(arguments)
        return Kind(item.placeholder, f"{count} {several}", lambda t: _exactly(count, item, t), count)
    return PLAIN.get(hint) or Kind(hint.__name__.upper(), f"a {hint.__name__}", hint.read)


def _chosen(choices: dict[str, Any], text: str) -> Any:
    if text not in choices:
        raise ValueError
    return choices[text]


def _first(kinds: list[Kind], text: str) -> Any:
    """By the first kind that can read the text."""
    for kind in kinds[:-1]:
        with suppress(ValueError):
            return kind.read(text)
    return kinds[-1].read(text)


def _items(item: Kind, texts: list[str]) -> tuple[Any, ...]:
    return tuple(item.read(part.strip()) for text in texts for part in text.split(",") if part.strip())


def _exactly(count: int, item: Kind, texts: list[str]) -> tuple[Any, ...]:
    if len(texts) != count:
        raise ValueError
    return tuple(map(item.read, texts))
