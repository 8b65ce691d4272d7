"""attnres lab ablation"""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..lab.ablation import AblationConfig, ablation, table
from ..model import DecoderShape, preset
from . import flags
from .lab_flags import GridFlags, seeds_of

PRESETS: dict[str, dict[str, Any]] = {
    "cpu": {"steps": 150, "batch_size": 8, "context": 128, "validate_every": 75, "validation_tokens": 65536, "jobs": 2},
    "small-gpu": {
        "steps": 600,
        "batch_size": 32,
        "context": 512,
        "validate_every": 200,
        "validation_tokens": 524288,
        "minutes": 9.0,
    },
}


@dataclass
class AblationFlags(GridFlags):
    """Train every row of the paper's ablation (section 8), over seeds: baseline, DenseFormer, mHC, Full AttnRes and its
    variants, Block AttnRes and its, and the sweep of block sizes.

    Writes results.json, table.csv, table.md and figures/ under --out. Called again after an interruption it continues.
    """

    preset: str | None = None
    """Size to start from: cpu, for two cores and half an hour, or small-gpu, for one GPU in calls of ten minutes; cpu
    if none is named."""
    model: DecoderShape = field(default_factory=DecoderShape)
    """Shape of the models."""


def run(argv: Sequence[str]) -> int:
    file = flags.peek(argv, "config")["config"]
    size = flags.peek([*flags.of_file(file, AblationFlags), *argv], "preset")["preset"] or "cpu"
    if size not in PRESETS:
        raise UsageError(f"--preset must be one of {', '.join(PRESETS)}; it is {size!r}")
    shape = dataclasses.replace(preset("tiny"), num_hidden_layers=8) if size == "cpu" else preset("small")
    default = AblationFlags(model=flags.open_shape(shape), seeds="0,1,2", out=Path("runs/ablation"), **PRESETS[size])
    given = flags.parse(AblationFlags, argv, "lab ablation", default, file)
    config = AblationConfig(
        train=flags.train_config(given, given.model, "prenorm", {}),
        seeds=seeds_of(given.seeds),
        jobs=given.jobs,
        minutes=given.minutes,
    )
    results = ablation(config, command=shlex.join(["attnres", "lab", "ablation", *argv]))
    print(table(results["summary"]))
    print(f"\nresults: {given.out / 'results.json'}", file=sys.stderr)
    return 0
