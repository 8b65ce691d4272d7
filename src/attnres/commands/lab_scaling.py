"""attnres lab scaling"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..lab.scaling import ScalingConfig, Size, scaling, table
from ..model import DecoderConfig
from ..run.config import TrainConfig
from . import flags
from .lab_flags import MatchedFlags, names_of, seeds_of

# WIDTHxBLOCKSxHEADS@LR
PRESETS: dict[str, dict[str, Any]] = {
    # two cores, two runs side by side
    "cpu": {
        "sizes": "32x4x2@5e-3,48x4x2@4e-3,64x5x4@3.5e-3,80x6x4@3e-3,96x6x4@3e-3",
        "tokens_per_parameter": 3.0, "jobs": 2, "precision": "float32",
    },
    # one GPU of 80 GB, in calls of ten minutes
    "small-gpu": {
        "sizes": "256x8x4@3e-3,384x10x6@2.5e-3,512x12x8@2e-3,640x14x10@1.6e-3,768x16x12@1.2e-3",
        "tokens_per_parameter": 8.0, "batch_size": 32, "context": 1024, "validation_tokens": 2**20, "compile": True,
        "minutes": 9.0,
    },
}  # fmt: skip


@dataclass
class ScalingFlags(MatchedFlags):
    """Train sizes x residual connections x seeds, fit the scaling law of each, and say how much compute one saves.

    All runs of a size have the same tokens, steps and learning rate. Writes results.json, table.csv and figures/ under
    --out. Called again after an interruption it continues.
    """

    sizes: str = ""
    """Sizes as WIDTHxBLOCKSxHEADS@LR, separated by commas; a size's learning rate serves all residual connections."""
    tokens_per_parameter: float = 3.0
    """Training tokens of a size, per activated parameter (without embeddings) of the baseline."""
    preset: str | None = None
    """Grid to start from: cpu, for two cores and an hour, or small-gpu, for one GPU in calls of ten minutes; cpu if
    none is named."""


def run(argv: Sequence[str]) -> int:
    file = flags.peek(argv, "config")["config"]
    preset = flags.peek([*flags.of_file(file, ScalingFlags), *argv], "preset")["preset"] or "cpu"
    if preset not in PRESETS:
        raise UsageError(f"--preset must be one of {', '.join(PRESETS)}; it is {preset!r}")
    default = ScalingFlags(seeds="0,1,2", out=Path("runs/scaling"), **PRESETS[preset])
    given = flags.parse(ScalingFlags, argv, "lab scaling", default, file)
    config = ScalingConfig(
        train=TrainConfig(**flags.run_fields(given), model=DecoderConfig(max_position_embeddings=given.context)),
        sizes=tuple(_size(text) for text in given.sizes.split(",")),
        residuals=names_of(given.residuals),
        seeds=seeds_of(given.seeds),
        tokens_per_parameter=given.tokens_per_parameter,
        jobs=given.jobs,
        minutes=given.minutes,
    )
    results = scaling(config, command=shlex.join(["attnres", "lab", "scaling", *argv]))
    print(table(results))
    print(f"\nresults: {given.out / 'results.json'}", file=sys.stderr)
    return 0


def _size(text: str) -> Size:
    try:
        shape, rate = text.split("@")
        width, blocks, heads = (int(part) for part in shape.split("x"))
        return Size(width, blocks, heads, float(rate))
    except ValueError as error:
        raise UsageError(f"--sizes must be WIDTHxBLOCKSxHEADS@LR, such as 64x5x4@3e-3; it is {text!r}") from error
