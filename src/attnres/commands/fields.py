"""The fields of dataclasses as flags: name, type and default, and as help the text under the field in the source."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import functools
import inspect
import itertools
import textwrap
import typing
from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass
from typing import Any

from ..errors import UsageError
from ..model import DecoderConfig
from ..run.config import TrainConfig
from .kinds import Kind, kind_of
from .residual_flags import residual_options

POSITIONAL = {"positional": True}
"""Metadata of a field that is given by its place on the line."""


@dataclass(frozen=True)
class Flag:
    """One flag. default: MISSING where it must be given."""

    name: str
    hint: Any
    default: Any
    text: Callable[[], str]
    positional: bool = False

    @property
    def option(self) -> str:
        return f"--{self.name.replace('_', '-')}"

    @property
    def kind(self) -> Kind:
        return kind_of(self.hint)

    def read(self, written: str | list[str]) -> Any:
        """The value that is written on the line or in a file. Raises UsageError."""
        if self.kind.count is None and isinstance(written, list):
            written = ",".join(written)
        if self.kind.count is not None and isinstance(written, str):
            written = [written]
        try:
            return self.kind.read(written)
        except UsageError:
            raise
        except ValueError:
            text = written if isinstance(written, str) else " ".join(written)
            raise UsageError(f"{self.option} must be {self.kind.wanted}; it is {text!r}") from None

    def help(self, default: Any) -> str:
        comma = "," if self.kind.count == "*" else " "
        shown = comma.join(map(str, default)) if isinstance(default, tuple) else default
        return f"{self.text()} ({'required' if default is MISSING else f'default: {shown}'})".replace("%", "%%")

    def add_to(self, parser: Any, **options: Any) -> None:
        """Enters the flag in an argparse parser or group."""
        if self.positional:
            parser.add_argument(self.name, nargs="?", metavar=self.name.upper(), **options)
        elif self.hint is bool:
            prefix, dot, last = self.option.removeprefix("--").rpartition(".")
            parser.add_argument(self.option, f"--{prefix}{dot}no-{last}", dest=self.name, action=_Switch, **options)
        else:
            count, placeholder = self.kind.count, self.kind.placeholder
            parser.add_argument(self.option, dest=self.name, nargs=count, metavar=placeholder, **options)


def flags_of(cls: Any, prefix: str = "") -> Iterator[Flag]:
    """The flags of a dataclass; those of a field that is one itself have its name in front, but for TrainConfig's."""
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        hint, name = hints[f.name], f"{prefix}{f.name}"
        if hint is DecoderConfig:
            yield from flags_of(hint, "model.")
            for option, (kind, default, help_text) in residual_options().items():
                yield Flag(f"residual.{option}", kind, default, functools.partial(str, help_text))
        elif dataclasses.is_dataclass(hint):
            yield from flags_of(hint, "" if hint is TrainConfig else f"{name}.")
        elif typing.get_origin(hint) is not dict and name != "model.residual":
            default = f.default if f.default_factory is MISSING else f.default_factory()
            text = functools.partial(_text, cls, f)
            yield Flag(name, hint, default, text, f.metadata.get("positional", False))


class _Switch(argparse.Action):
    """--flag and --no-flag."""

    def __init__(self, option_strings: list[str], dest: str, **options: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, **options)

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, str(option_string == self.option_strings[0]))


def _text(cls: Any, field: Any) -> str:
    """The help of a field: of its metadata, or the text under it."""
    return field.metadata.get("help") or _texts(cls).get(field.name, "")


@functools.cache
def _texts(cls: Any) -> dict[str, str]:
    """The texts under the fields of a dataclass, those that it inherits included."""
    texts = {}
    for base in reversed(cls.__mro__):
        if dataclasses.is_dataclass(base):
            source = textwrap.dedent(inspect.getsource(base))  # type: ignore[arg-type]
            body = ast.parse(source).body[0].body  # type: ignore[attr-defined]
            for field, after in itertools.pairwise(body):
                if isinstance(field, ast.AnnAssign) and isinstance(after, ast.Expr):
                    texts[ast.unparse(field.target)] = " ".join(ast.literal_eval(after.value).split())
    return texts
