"""attnres lab sweep"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import UsageError
from ..lab.sweep import SweepConfig, summary, sweep
from ..model import DecoderConfig
from ..run.config import TrainConfig
from . import flags
from .lab_flags import MatchedFlags, names_of, seeds_of


@dataclass
class SweepFlags(MatchedFlags):
    """Train shapes of equal parameters and compute, width and heads per Transformer block, with several residual
    connections, and show where each has its optimum.

    Writes results.json, table.csv and figures/ under --out. Called again after an interruption it continues.
    """

    widths: str = "4,8,12,16,24"
    """Ratios d_model / L_b, separated by commas; the paper has 15,30,45,60,75 at 230M parameters."""
    heads: str = "0.3,0.4,0.5,0.6,0.7"
    """Ratios heads / L_b, separated by commas."""
    parameters: int = 300_000
    """Activated parameters of the baseline in each cell, without embeddings."""
    compute: float = 1e12
    """Training compute of each run in FLOP, counted on the baseline."""


def run(argv: Sequence[str]) -> int:
    file = flags.peek(argv, "config")["config"]
    default = SweepFlags(residuals="prenorm,full_attnres", out=Path("runs/sweep"), jobs=2, precision="float32")
    given = flags.parse(SweepFlags, argv, "lab sweep", default, file)
    config = SweepConfig(
        train=TrainConfig(**flags.run_fields(given), model=DecoderConfig(max_position_embeddings=given.context)),
        widths=_ratios("widths", given.widths),
        heads=_ratios("heads", given.heads),
        residuals=names_of(given.residuals),
        seeds=seeds_of(given.seeds),
        parameters=given.parameters,
        compute=given.compute,
        jobs=given.jobs,
        minutes=given.minutes,
    )
    results = sweep(config, command=shlex.join(["attnres", "lab", "sweep", *argv]))
    print(summary(results))
    print(f"\nresults: {given.out / 'results.json'}", file=sys.stderr)
    return 0


def _ratios(name: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise UsageError(f"--{name} must be numbers separated by commas; it is {text!r}") from error
