"""Command lines out of dataclasses, whose fields are the flags.

A flag on the line wins over a YAML file, both win over a preset or a saved run, and these over the field's default. All
four are values by the name of the flag as a file spells it, such as "optim.lr".
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import inspect
import sys
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

from ..errors import UsageError
from ..model import DecoderConfig, preset, presets
from ..run.config import TrainConfig
from .fields import Flag, flags_of

T = TypeVar("T")
Values = dict[str, Any]


@dataclass
class FileFlags:
    config: Path | None = None
    """YAML file with any of these settings; flags win over it."""


@dataclass
class PresetFlags(FileFlags):
    preset: str | None = dataclasses.field(
        default=None, metadata={"help": f"Shape to start from: {', '.join(presets())}; tiny if none is named."}
    )


@dataclass
class LabFlags(FileFlags):
    out: Path = Path("runs/lab")
    """Folder of all runs and of what is found in them."""


SET_BY_LAB = ("seed", "parallel", "residual.name")
"""Flags of a run that commands which train more than one set themselves."""


class Given:
    """The settings of one call. `flags`: what there is; `file`: what the YAML file at `path` says."""

    def __init__(self, flags: dict[str, Flag], start: Values, file: Values, line: Values, path: str | None) -> None:
        defaults = {name: flag.default for name, flag in flags.items() if flag.default is not MISSING}
        self.start, self.file, self.path = {**defaults, **start}, file, path
        self.values = {**self.start, **file, **line}

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    def make(self, cls: type[T], prefix: str = "", **fixed: Any) -> T:
        """An instance of a dataclass: each field `fixed`, or of the value of its flag. Raises UsageError."""
        try:
            return _made(cls, prefix, self.values, fixed)
        except UsageError:
            if self.path:
                try:
                    _made(cls, prefix, {**self.start, **self.file}, fixed)
                except UsageError as error:
                    raise UsageError(f"--config {self.path}: {error}") from None
            raise

    def residual(self) -> tuple[str, Values]:
        """The residual connection of a run, and its options."""
        name = self["residual.name"]
        return name, self.options_for(name, self.residual_options())

    def residual_options(self) -> Values:
        """The options that were given for residual connections."""
        names = [name for name in self.values if name.startswith("residual.") and name != "residual.name"]
        return {name.removeprefix("residual."): self[name] for name in names if self[name] is not None}

    def options_for(self, mechanism: str, chosen: Values) -> Values:
        """The options that were chosen for a mechanism; or, if none was, the preset's for its own."""
        if chosen or not self["preset"]:
            return chosen
        named = preset(self["preset"])
        return named.residual_options if mechanism == named.residual else {}

    def train(self, residual: str, options: Values) -> TrainConfig:
        """The run that the flags describe, with this residual connection."""
        model = self.make(DecoderConfig, "model.", residual=residual, residual_options=options)
        return self.make(TrainConfig, model=model)


def parse(
    command: str,
    argv: Sequence[str],
    *classes: Any,
    start: Callable[[Values], Values] = lambda given: {},
    without: Iterable[str] = (),
) -> Given:
    """The settings of a command line, and of its file if it has --config; --help prints the flags and ends the process.

    Args:
        classes: dataclasses whose fields are the flags; of two fields of one name the later one's. The last docstring
            says what the command does.
        start: the defaults that follow from what was given, such as those of a preset.
        without: flags, or groups of them, that the command does not have.

    Raises UsageError for what is unknown, of a wrong type, or missing.
    """
    found = {flag.name: flag for cls in classes for flag in flags_of(cls)}
    hidden = tuple(without)
    flags = {n: flag for n, flag in found.items() if n not in hidden and n.partition(".")[0] not in hidden}
    line, asked = _line(argv, flags)
    file = _file(line["config"], flags) if line.get("config") else {}
    given = Given(flags, start({**file, **line}), file, line, line.get("config"))
    if asked:
        print(_help(command, inspect.getdoc(classes[-1]) or "", flags, given.start), end="")
        sys.exit()
    for name, flag in flags.items():
        if name not in given.values:
            raise UsageError(f"{name.upper()} is missing: {flag.text()}")
    return given


def values_of(instance: Any, prefix: str = "") -> Values:
    """The values of the flags of a dataclass."""
    values: Values = {}
    for f in dataclasses.fields(instance):
        value, name = getattr(instance, f.name), f"{prefix}{f.name}"
        if isinstance(value, DecoderConfig):
            values |= shape_of(value)
            values |= {f"residual.{n}": v for n, v in {"name": value.residual, **value.residual_options}.items()}
        elif dataclasses.is_dataclass(value):
            values |= values_of(value, f"{name}.")
        else:
            values[name] = value
    return values


def shape_of(model: DecoderConfig) -> Values:
    """Its shape, with the sizes that follow from others left open, so that flags move those too."""
    fields = [f for f in dataclasses.fields(DecoderConfig) if not f.name.startswith("residual")]
    sizes = {f.name: getattr(model, f.name) for f in fields}
    shape = dict(sizes)
    for name in (f.name for f in fields if f.default is None):
        if name == "head_dim" and sizes[name] * model.num_attention_heads != model.hidden_size:
            continue  # without it the heads may not fit
        with suppress(UsageError):  # of a shape that cannot be without it
            if getattr(DecoderConfig(**{**sizes, name: None}), name) == sizes[name]:
                shape[name] = None
    return {f"model.{name}": value for name, value in shape.items()}


def of_preset(given: Values) -> Values:
    """The defaults that the preset names, or else the smallest."""
    return shape_of(preset(given.get("preset") or "tiny"))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise UsageError(message.removeprefix("argument "))


def _line(argv: Sequence[str], flags: dict[str, Flag]) -> tuple[Values, bool]:
    """The values that are given on the line, and whether its help is asked for."""
    parser = _Parser(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.add_argument("-h", "--help", action="store_true")
    for flag in flags.values():
        flag.add_to(parser)
    found, unknown = parser.parse_known_intermixed_args([_with_dashes(word) for word in argv])
    if unknown:
        raise UsageError(_unrecognized(unknown, flags))
    written = vars(found)
    asked = written.pop("help", False)
    return {name: flags[name].read(text) for name, text in written.items()}, asked


def _with_dashes(word: str) -> str:
    option, equals, value = word.partition("=")
    return f"{option.replace('_', '-')}{equals}{value}" if word.startswith("--") else word


def _unrecognized(words: list[str], flags: dict[str, Flag]) -> str:
    options = [word.partition("=")[0] for word in words if word.startswith("--")]
    known = {flag.option: flag for flag in flags.values() if not flag.positional}
    near = [known[match] for o in options for match in difflib.get_close_matches(o, known, n=1)]
    hint = "".join(f"; Perhaps you meant: {flag.option} {flag.kind.placeholder}" for flag in near[:1])
    return f"Unrecognized options: {', '.join(words)}{hint}"


def _file(path: Path, flags: dict[str, Flag]) -> Values:
    """The values in a YAML file, a mapping of the flags' names."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--config {path} cannot be read: {error.strerror}; give a YAML file") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"--config {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UsageError(f"--config {path} must be a mapping of flag names to values, such as `steps: 1000`")
    written = dict(_flat(values))
    try:
        unknown = [f"--{name.replace('_', '-')}={text}" for name, text in written.items() if name not in flags]
        if unknown:
            raise UsageError(_unrecognized(unknown, flags))
        return {name: flags[name].read(text) for name, text in written.items()}
    except UsageError as error:
        raise UsageError(f"--config {path}: {error}") from None


def _flat(values: dict[Any, Any], prefix: str = "") -> Iterator[tuple[str, str | list[str]]]:
    for key, value in values.items():
        name = prefix + str(key).replace("-", "_")
        if isinstance(value, dict):
            yield from _flat(value, f"{name}.")
        else:
            yield name, [str(item) for item in value] if isinstance(value, list) else str(value)


def _made(cls: type[T], prefix: str, values: Values, fixed: Values) -> T:
    hints = typing.get_type_hints(cls)
    parts = dict(fixed)
    for f in dataclasses.fields(cls):  # type: ignore[arg-type]
        name = f"{prefix}{f.name}"
        if f.name not in fixed and dataclasses.is_dataclass(hints[f.name]):
            parts[f.name] = _made(hints[f.name], f"{name}.", values, {})
        elif f.name not in fixed and name in values:
            parts[f.name] = values[name]
    return cls(**parts)


def _help(command: str, text: str, flags: dict[str, Flag], defaults: Values) -> str:
    positionals = "".join(f" {name.upper()}" for name, flag in flags.items() if flag.positional)
    parser = _Parser(usage=f"attnres {command} [--help] [OPTIONS]{positionals}", description=text, add_help=False)
    groups: dict[str, Any] = {}
    for name, flag in sorted(flags.items(), key=lambda item: (not item[1].positional, "." in item[0])):
        title = "arguments" if flag.positional else " ".join([*name.split(".")[:-1], "options"])
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        flag.add_to(groups[title], help=flag.help(defaults.get(name, MISSING)))
    return parser.format_help()
