"""Flags that several commands share, and where their defaults come from: a preset, a YAML file, a saved run."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro
import yaml

from .. import residual as residuals
from ..errors import UsageError
from ..model import DecoderConfig, DecoderShape, preset
from ..train.config import RunConfig, TrainConfig
from ..train.optim import OptimConfig

T = TypeVar("T")
OPTION_HELP = r"^ *%s: (.*?)(?=^ *\w+: |\n\n)"  # its entry under "Args:" in a docstring
DERIVED = ("num_key_value_heads", "head_dim", "intermediate_size")


def parse(flags: type[T], argv: Sequence[str], command: str, default: T) -> T:
    """The flags of a command line. Bad usage ends the process with status 2, --help with 0."""
    return tyro.cli(
        flags,
        args=list(argv),
        default=default,
        prog=f"attnres {command}",
    )


def peek(argv: Sequence[str], *names: str) -> dict[str, str | None]:
    """Values of flags that decide the defaults of the others, before those are parsed."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in names:
        early.add_argument(f"--{name}", nargs="?", const="")
    return vars(early.parse_known_args(list(argv))[0])


def read_yaml(path: str | None) -> dict[str, Any]:
    """The mapping in a YAML file whose keys are the flags' names; nothing for no file."""
    if not path:
        return {}
    try:
        values = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise UsageError(f"--config {path} cannot be read: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise UsageError(f"--config {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UsageError(f"--config {path} must be a mapping of flag names to values, such as `steps: 1000`")
    return {str(name).replace("-", "_"): value for name, value in values.items()}


def run_defaults(cls: type[T], values: dict[str, Any], preset_name: str | None, **more: Any) -> T:
    """An instance of a flags class from a YAML mapping over a preset; other fields keep their defaults."""
    values = dict(values)
    shape = shape_default(preset_name or values.pop("preset", None) or "tiny", values.pop("model", {}))
    parts: dict[str, Any] = {"model": shape, "optim": _part(OptimConfig, values.pop("optim", {}), "optim."), **more}
    return _part(cls, {**values, **parts}, "")


def shape_default(preset_name: str, changes: dict[str, Any]) -> DecoderShape:
    """A preset's shape with changes; sizes that follow from others stay open, so that flags can still move those."""
    base = preset(preset_name)
    given = {f.name: getattr(base, f.name) for f in dataclasses.fields(DecoderShape)}
    free = DecoderShape(hidden_size=base.hidden_size, num_attention_heads=base.num_attention_heads)
    for name in DERIVED:
        if given[name] == getattr(free, name):
            given[name] = None
    shape = _part(DecoderShape, {**given, **changes}, "model.")
    for name in DERIVED:
        setattr(shape, name, changes.get(name, given[name]))
    return shape


def _part(cls: type[T], values: dict[str, Any], prefix: str) -> T:
    known = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    for name in values:
        if name not in known:
            raise UsageError(f"--config has no field {prefix}{name}; known: {', '.join(known)}")
    return cls(**values)


def _residual_options() -> dict[str, tuple[Any, str]]:
    """Every option of every registered mechanism: name -> (type, help from the class docstring)."""
    found: dict[str, tuple[Any, str]] = {}
    for name in residuals.names():
        cls = residuals.get(name)
        hints = typing.get_type_hints(cls.__init__)
        for option in inspect.signature(cls.__init__).parameters:
            if option in ("self", "dim", "num_layers"):
                continue
            text = re.search(OPTION_HELP % option, inspect.getdoc(cls) or "", re.DOTALL | re.MULTILINE)
            found.setdefault(option, (hints[option], " ".join(text[1].split()) if text else ""))
    return found


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


def train_config(flags: RunConfig, shape: DecoderShape, name: str, options: dict[str, Any]) -> TrainConfig:
    """The run that the flags describe."""
    model = DecoderConfig(**dataclasses.asdict(shape), residual=name, residual_options=options)
    shared = {f.name: getattr(flags, f.name) for f in dataclasses.fields(RunConfig)}
    return TrainConfig(**shared, model=model)
