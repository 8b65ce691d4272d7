"""attnres train"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from ..parallel.mesh import launched_processes
from ..run.config import TrainConfig
from ..run.folder import read_config
from ..train.trainer import train
from . import flags


@dataclass
class TrainFlags(flags.PresetFlags):
    """Train one language model; Ctrl-C, SIGTERM or SIGHUP saves a checkpoint, --resume goes on from it."""

    resume: bool = False
    """Go on with the run in --out; its saved settings are the defaults."""


def run(argv: Sequence[str]) -> int:
    given = flags.parse("train", argv, TrainConfig, TrainFlags, start=_start)
    result = train(config := given.train(*given.residual()), given["resume"])
    if result.finished and os.environ.get("RANK", "0") == "0":
        print(f"validation loss {result.val_loss:.4f} after {result.tokens:,} tokens; saved in {config.out}")
        print(f"next: attnres generate {config.out} --prompt 'def '", file=sys.stderr)
    return 0


def _start(given: flags.Values) -> flags.Values:
    """The settings of the run that is resumed, but for its split over processes if it is to be another; or a preset."""
    if not given.get("resume"):
        return flags.of_preset(given)
    saved = read_config(given.get("out", TrainConfig.out))
    values = flags.values_of(saved) | (flags.of_preset(given) if given.get("preset") else {})
    if any(name.startswith("parallel.") for name in given) or launched_processes() != saved.parallel.world_size:
        values = {name: value for name, value in values.items() if not name.startswith("parallel.")}
    return values
