"""attnres lab dynamics"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..lab.compare import CompareConfig
from ..lab.dynamics import dynamics
from ..model import DecoderShape, preset
from . import flags
from .compare import options_of
from .lab_flags import GridFlags, names_of, seeds_of

ResidualFlags: Any = flags.residual_flags(with_name=False)


@dataclass
class DynamicsFlags(GridFlags):
    """Train residual connections and look inside at every validation: loss, and output and gradient magnitude of each
    Transformer block, over the training.

    Writes results.json, figures/ and dynamics.html, a page with a slider, under --out. Called again after an
    interruption it continues.
    """

    residuals: str = "prenorm,block_attnres,full_attnres"
    """Residual connections, separated by commas; the first is the baseline."""
    validate_every: int = 20
    """Steps between looks inside, each with a validation."""
    preset: flags.PresetName = None
    model: DecoderShape = field(default_factory=DecoderShape)
    """Shape of the models."""
    residual: ResidualFlags = field(default_factory=ResidualFlags)
    """Options for every residual connection that has them."""


def run(argv: Sequence[str]) -> int:
    file = flags.peek(argv, "config")["config"]
    shape = flags.peek([*flags.of_file(file, DynamicsFlags), *argv], "preset")["preset"] or "tiny"
    default = DynamicsFlags(model=flags.open_shape(preset(shape)), out=Path("runs/dynamics"), jobs=2)
    given = flags.parse(DynamicsFlags, argv, "lab dynamics", default, file)
    names = names_of(given.residuals)
    config = CompareConfig(
        residuals=names,
        seeds=seeds_of(given.seeds),
        train=flags.train_config(given, given.model, names[0], {}),
        residual_options={
            name: flags.options_for(name, options, given.preset)
            for name, options in options_of(names, flags.chosen_options(given.residual)).items()
        },
    )
    command = shlex.join(["attnres", "lab", "dynamics", *argv])
    dynamics(config, jobs=given.jobs, minutes=given.minutes, command=command)
    print(f"results: {given.out / 'dynamics.html'}, {given.out / 'figures'}", file=sys.stderr)
    return 0
