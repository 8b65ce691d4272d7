"""Flags that several commands share, and where their values come from: a preset, a saved run, a YAML file, the line."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import inspect
import io
import re
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro
import yaml

from .. import residual as residuals
from ..errors import UsageError
from ..files import user_path
from ..model import DecoderConfig, DecoderShape, preset, presets
from ..run.config import RunConfig, TrainConfig

T = TypeVar("T")
PresetName = Annotated[
    str | None, tyro.conf.arg(help=f"Shape to start from: {', '.join(presets())}; tiny if none is named.")
]
OPTION_HELP = r"^ *%s: (.*?)(?=^ *\w+: |\n\n)"  # its entry under "Args:" in a docstring


def parse(flags: type[T], argv: Sequence[str], command: str, default: Any, config: str | None = None) -> T:
    """The flags of a command line, which win over those of the YAML file `config`; --help ends the process.

    Raises UsageError for what is unknown or of a wrong type.
    """
    in_file = of_file(config, flags)
    try:
        return _parse(flags, [*in_file, *argv], command, default)
    except UsageError:
        if in_file:
            try:
                _parse(flags, in_file, command, default)
            except UsageError as error:
                raise UsageError(f"--config {config}: {error}") from None
        raise


def _parse(flags: type[T], argv: Sequence[str], command: str, default: Any) -> T:
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return _with_paths(tyro.cli(flags, args=argv, default=default, prog=f"attnres {command}"))
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UsageError(_sentence(box.getvalue())) from None


def _with_paths(given: T) -> T:
    """The flags with every path as `user_path` reads it."""
    for f in dataclasses.fields(given):  # type: ignore[arg-type]
        if isinstance(value := getattr(given, f.name), Path):
            setattr(given, f.name, user_path(value))
    return given


def _sentence(box: str) -> str:
    """tyro's error, a box with lines across, in colour on a terminal, as one sentence."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", box)
    text = " ".join(row.strip("│ ") for row in plain.splitlines()[1:-1])
    message, *more = (part.strip() for part in re.split("─{3,}", text))
    ours = re.fullmatch(r"Error parsing \w+: (.*)", message)  # a UsageError of a dataclass: complete as it is
    return ours[1] if ours else "; ".join([message.removeprefix("Error parsing ").rstrip("."), *more])


def peek(argv: Sequence[str], *names: str) -> dict[str, str | None]:
    """Values of flags that decide the defaults of the others, before those are parsed."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in names:
        early.add_argument(f"--{name}", nargs="?", const="")
    return vars(early.parse_known_args(list(argv))[0])


def of_file(path: str | None, flags: Any) -> list[str]:
    """The settings of a YAML file, a mapping of the names of `flags`, as a command line; nothing for no file."""
    if not path:
        return []
    try:
        values = yaml.safe_load(user_path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--config {path} cannot be read: {error.strerror}; give a YAML file") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"--config {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UsageError(f"--config {path} must be a mapping of flag names to values, such as `steps: 1000`")
    return list(_as_flags(values, flags, ""))


def _as_flags(values: dict[Any, Any], flags: Any, prefix: str) -> Iterator[str]:
    fields = {f.name: f for f in dataclasses.fields(flags)} if flags is not None else {}
    for key, value in values.items():
        name = str(key).replace("_", "-")
        field = fields.get(name.replace("-", "_"))
        if isinstance(value, dict):
            part = field.default_factory if field is not None else None
            yield from _as_flags(value, part if dataclasses.is_dataclass(part) else None, f"{prefix}{name}.")
        elif isinstance(value, bool) and field is not None and isinstance(field.default, bool):
            yield f"--{prefix}{'' if value else 'no-'}{name}"
        elif isinstance(value, list) and field is not None and isinstance(field.default, str):
            yield f"--{prefix}{name}={','.join(map(str, value))}"
        elif isinstance(value, list):
            yield from (f"--{prefix}{name}", *map(str, value))
        else:
            yield f"--{prefix}{name}={value}"


def open_shape(model: DecoderShape) -> DecoderShape:
    """Its shape with the sizes that follow from others left open, so that flags move those too."""
    sizes = {f.name: getattr(model, f.name) for f in dataclasses.fields(DecoderShape)}
    shape = DecoderShape(**sizes)
    for name in (f.name for f in dataclasses.fields(DecoderShape) if f.default is None):
        if name == "head_dim" and sizes[name] * model.num_attention_heads != model.hidden_size:
            continue  # without it the heads may not fit
        if getattr(DecoderShape(**{**sizes, name: None}), name) == sizes[name]:
            setattr(shape, name, None)
    return shape


def _residual_options() -> dict[str, tuple[Any, str]]:
    """Every option of every registered mechanism: name -> (type, help from the class docstrings)."""
    kinds: dict[str, Any] = {}
    texts: dict[str, dict[str, list[str]]] = {}
    for name in residuals.names():
        cls = residuals.get(name)
        hints = typing.get_type_hints(cls.__init__)
        for option in inspect.signature(cls.__init__).parameters:
            if option in ("self", "dim", "num_layers"):
                continue
            text = re.search(OPTION_HELP % option, inspect.getdoc(cls) or "", re.DOTALL | re.MULTILINE)
            kinds.setdefault(option, hints[option])
            texts.setdefault(option, {}).setdefault(" ".join(text[1].split()) if text else "", []).append(name)
    return {
        option: (kind, " ".join(f"{text} [{', '.join(names)}]" for text, names in texts[option].items()))
        for option, kind in kinds.items()
    }


def residual_flags(with_name: bool) -> Any:
    """A dataclass of the options of all mechanisms; None leaves an option at its default."""
    fields: list[Any] = []
    if with_name:
        text = f"Residual connection: {', '.join(residuals.names())}."
        fields.append(("name", Annotated[str, tyro.conf.arg(help=text)], dataclasses.field(default="block_attnres")))
    for option, (kind, text) in _residual_options().items():
        fields.append((option, Annotated[kind | None, tyro.conf.arg(help=text)], dataclasses.field(default=None)))
    return dataclasses.make_dataclass("ResidualFlags", fields)


def chosen_options(flags: Any) -> dict[str, Any]:
    """The options that were given."""
    return {
        f.name: getattr(flags, f.name)
        for f in dataclasses.fields(flags)
        if f.name != "name" and getattr(flags, f.name) is not None
    }


def options_for(mechanism: str, chosen: dict[str, Any], preset_name: str | None) -> dict[str, Any]:
    """The options that were given for a mechanism; or, if none was, the preset's for its own."""
    if chosen or not preset_name:
        return chosen
    named = preset(preset_name)
    return named.residual_options if mechanism == named.residual else {}


def train_config(flags: RunConfig, shape: DecoderShape, name: str, options: dict[str, Any]) -> TrainConfig:
    """The run that the flags describe."""
    model = DecoderConfig(**dataclasses.asdict(shape), residual=name, residual_options=options)
    return TrainConfig(**run_fields(flags), model=model)


def run_fields(config: RunConfig) -> dict[str, Any]:
    """What a run has beside its model, by name."""
    return {f.name: getattr(config, f.name) for f in dataclasses.fields(RunConfig)}
