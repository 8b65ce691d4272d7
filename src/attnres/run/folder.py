"""The folder of a run: who may write there, its configuration, its weights."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

from .. import files, json_text
from ..errors import Failure, UsageError
from . import checkpoint, hardware
from .config import TrainConfig, check_compatible
from .optim_config import same_rates
from .stored import Stored

LOGGER = logging.getLogger(__name__)
C = TypeVar("C", bound=Any)


def check_folder(out: Path, resume: bool) -> None:
    """Raises UsageError unless `out` holds a run exactly if one is to be resumed, Failure if it is not writable."""
    exists = os.path.exists(out / "config.json")
    if exists and not resume:
        raise UsageError(f"out holds a run already: {out}; pass --resume to go on with it, or another --out")
    if resume and not exists:
        raise UsageError(f"nothing to resume in {out}: it has no config.json; leave out --resume to start there")
    nearest = next(folder for folder in (out, *out.absolute().parents) if os.path.exists(folder))
    if not (nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)):
        raise Failure(f"cannot write {out}: {nearest} is not a folder that you may write to; choose another --out")


@contextmanager
def held(out: Path, wait: bool = True) -> Iterator[None]:
    """Makes the folder `out` and keeps other processes from training in it.

    The system lets go of it when this process ends, however it ends; a file system without locks keeps nobody away, as
    a warning says. Waits for another process that has the folder, or raises Failure with wait=False; also if the folder
    cannot be made.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Failure(f"cannot write {out}: {error.strerror}; choose another --out") from error
    with ExitStack() as stack:
        try:
            stack.callback(os.close, folder := os.open(out, os.O_RDONLY))
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not wait:
                    raise Failure(
                        f"another process works in {out}: wait for its end, or choose another --out"
                    ) from None
                print(f"waiting for another process that trains in {out} to end", file=sys.stderr, flush=True)
                fcntl.flock(folder, fcntl.LOCK_EX)
        except OSError as error:  # no locks on this file system, or a folder that may be written and not read
            LOGGER.warning("%s cannot be locked (%s): see that no other process trains there", out, error.strerror)
        yield


def write_config(config: TrainConfig) -> None:
    """Writes config.json, whole or not at all."""
    file = config.out / "config.json"
    try:
        files.write(file, json.dumps(config.to_dict(), indent=2) + "\n")
    except OSError as error:
        raise Failure(f"cannot write {file}: {error.strerror}; choose another --out") from error


def read_config(path: Path) -> TrainConfig:
    """The configuration of a run folder. Raises UsageError if there is none, Failure if it cannot be read."""
    file = path / "config.json"
    if not os.path.exists(file):
        raise UsageError(f"{path} is not a run: it has no config.json; give the --out of an `attnres train`")
    try:
        values = json_text.parse_object(files.read(file))
    except (OSError, ValueError) as error:
        raise Failure(f"{file} cannot be read: {error}; give another run") from error
    return TrainConfig.from_dict(values)


def continued(saved: TrainConfig, config: TrainConfig) -> TrainConfig:
    """`config` as it goes on with a run of the configuration `saved`: at its precision, where it leaves that open.

    Raises UsageError if the two have different loss curves.
    """
    config = config.with_precision_of(saved)
    check_compatible(saved.with_precision_of(config).curve(), config.curve())
    return config


def settled(config: C) -> C:
    """`config` with a precision that does not depend on the machine any more: what this one has for "auto".

    config: a TrainConfig, or another dataclass with device and precision.
    """
    precision = hardware.find_precision(config.precision, hardware.find_device(config.device))
    return dataclasses.replace(config, precision=hardware.name_of(precision))


def newest_checkpoint(out: Path) -> Path | None:
    """The newest whole checkpoint; None if the run has not saved one. Raises Failure if all of them are damaged."""
    folder = out / "checkpoints"
    newest = checkpoint.latest(folder)
    if newest is None and any(folder.glob("step-*")):
        raise Failure(f"every checkpoint in {folder} is damaged; start a new run in another --out")
    return newest


def open_checkpoint(path: Path, config: TrainConfig) -> Stored:
    """A checkpoint of this very run. Raises UsageError if it belongs to another configuration."""
    stored = checkpoint.opened(path)
    continued(TrainConfig.from_dict(stored.state()["config"]), config)
    return stored


def check_length(saved_steps: int, step: int, config: TrainConfig) -> None:
    """Raises UsageError unless a run of config.steps takes the first `step` steps of one of `saved_steps`."""
    if step > config.steps:
        raise UsageError(f"steps must be at least {step}, which the run has taken; it is {config.steps}")
    if config.steps != saved_steps and not same_rates(step, saved_steps, config.steps, config.optim):
        raise UsageError(
            f"steps is {saved_steps} in the checkpoint and {config.steps} now, which would have given the {step} steps "
            "so far other learning rates: only a run with a constant schedule, or wsd before its decay, can change its "
            f"length; resume with --steps {saved_steps}, or start a new run with --optim.schedule wsd or constant"
        )
