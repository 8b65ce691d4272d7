"""attnres train"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..files import user_path
from ..model import DecoderShape, preset
from ..parallel.config import ParallelConfig
from ..parallel.mesh import launched_processes
from ..run.config import RunConfig
from ..run.folder import read_config
from ..train.trainer import train
from . import flags

ResidualFlags: Any = flags.residual_flags(with_name=True)


@dataclass
class TrainFlags(RunConfig):
    """Train one language model; Ctrl-C, SIGTERM or SIGHUP saves a checkpoint, --resume goes on from it."""

    resume: bool = False
    """Go on with the run in --out; its saved settings are the defaults."""
    config: Path | None = None
    """YAML file with any of these settings; flags win over it."""
    preset: flags.PresetName = None
    model: DecoderShape = field(default_factory=DecoderShape)
    """Shape of the model."""
    residual: ResidualFlags = field(default_factory=ResidualFlags)
    """Residual connection and its options."""


def run(argv: Sequence[str]) -> int:
    file = flags.peek(argv, "config")["config"]
    settings = [*flags.of_file(file, TrainFlags), *argv]
    early = flags.peek(settings, "preset", "out")
    if "--resume" in settings:
        default = _saved(
            user_path(early["out"] or RunConfig.out), any(flag.startswith("--parallel.") for flag in settings)
        )
    else:
        default = TrainFlags(model=flags.open_shape(preset("tiny")))
    if early["preset"]:
        default.model = flags.open_shape(preset(early["preset"]))
    given = flags.parse(TrainFlags, argv, "train", default, file)
    options = flags.options_for(given.residual.name, flags.chosen_options(given.residual), given.preset)
    config = flags.train_config(given, given.model, given.residual.name, options)
    result = train(config, given.resume)
    if result.finished and os.environ.get("RANK", "0") == "0":
        print(f"validation loss {result.val_loss:.4f} after {result.tokens:,} tokens; saved in {config.out}")
        print(f"next: attnres generate {config.out} --prompt 'def '", file=sys.stderr)
    return 0


def _saved(out: Path, other_split: bool) -> TrainFlags:
    """The settings of the run in `out`, but for its split over processes if it is to be another."""
    saved = read_config(out)
    residual = ResidualFlags(name=saved.model.residual, **saved.model.residual_options)
    fields = flags.run_fields(saved)
    if other_split or launched_processes() != saved.parallel.world_size:
        fields["parallel"] = ParallelConfig()
    return TrainFlags(**fields, model=flags.open_shape(saved.model), residual=residual)
