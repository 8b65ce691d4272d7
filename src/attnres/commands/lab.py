"""attnres lab: the paper's experiments, one sub-command each."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import UsageError
from ..lab.ablation import AblationConfig, ablation
from ..lab.ablation import table as ablation_table
from ..lab.compare import CompareConfig
from ..lab.dynamics import dynamics
from ..lab.experiment import Experiment
from ..lab.scaling import ScalingConfig, Size, scaling
from ..lab.scaling import table as scaling_table
from ..lab.sweep import SweepConfig, summary, sweep
from ..model import DecoderConfig, preset
from ..model.config import MOST
from ..run.config import TrainConfig
from . import flags
from .compare import comparison

# how to start: two cores, or one GPU of 80 GB in calls of ten minutes; a size is WIDTHxBLOCKSxHEADS@LR
ABLATION: dict[str, flags.Values] = {
    "cpu": {"steps": 150, "batch_size": 8, "context": 128, "validate_every": 75, "validation_tokens": 65536, "jobs": 2},
    "small-gpu": {
        "steps": 600, "batch_size": 32, "context": 512, "validate_every": 200, "validation_tokens": 524288,
        "minutes": 9.0,
    },
}  # fmt: skip
SCALING: dict[str, flags.Values] = {
    "cpu": {
        "sizes": "32x4x2@5e-3,48x4x2@4e-3,64x5x4@3.5e-3,80x6x4@3e-3,96x6x4@3e-3",
        "tokens_per_parameter": 3.0, "jobs": 2, "precision": "float32",
    },
    "small-gpu": {
        "sizes": "256x8x4@3e-3,384x10x6@2.5e-3,512x12x8@2e-3,640x14x10@1.6e-3,768x16x12@1.2e-3",
        "tokens_per_parameter": 8.0, "batch_size": 32, "context": 1024, "validation_tokens": 2**20, "compile": True,
        "minutes": 9.0,
    },
}  # fmt: skip
SHAPES = ("model", "residual", "steps", "validate_every")
"""Flags of experiments that make the shapes of their runs, and their lengths, themselves: those that they lack."""


@dataclass
class ScalingFlags(flags.LabFlags):
    """Train sizes x residual connections x seeds, fit the scaling law of each, and say how much compute one saves.

    All runs of a size have the same tokens, steps and learning rate. Writes results.json, table.csv and figures/ under
    --out. Called again after an interruption it continues.
    """

    preset: str | None = None
    """Grid to start from: cpu, for two cores and an hour, or small-gpu, for one GPU in calls of ten minutes; cpu if
    none is named."""


def _scaling(argv: Sequence[str], command: str) -> None:
    def start(given: flags.Values) -> flags.Values:
        values = _named(SCALING, given)
        return {**values, "sizes": tuple(map(Size.read, values["sizes"].split(",")))}

    given = _parsed("scaling", argv, ScalingConfig, ScalingFlags, start, SHAPES)
    _tell(scaling_table(scaling(given.make(ScalingConfig, train=_without_shape(given)), command)), given)


@dataclass
class AblationFlags(flags.LabFlags):
    """Train every row of the paper's ablation (section 8), over seeds: baseline, DenseFormer, mHC, Full AttnRes and its
    variants, Block AttnRes and its, and the sweep of block sizes.

    Writes results.json, table.csv, table.md and figures/ under --out. Called again after an interruption it continues.
    """

    preset: str | None = None
    """Size to start from: cpu, for two cores and half an hour, or small-gpu, for one GPU in calls of ten minutes; cpu
    if none is named."""


def _ablation(argv: Sequence[str], command: str) -> None:
    def start(given: flags.Values) -> flags.Values:
        values = _named(ABLATION, given)
        small = values is ABLATION["cpu"]
        shape = dataclasses.replace(preset("tiny"), num_hidden_layers=8) if small else preset("small")
        return {**flags.shape_of(shape), **values}

    given = _parsed("ablation", argv, AblationConfig, AblationFlags, start, ("residual",))
    results = ablation(given.make(AblationConfig, train=given.train("prenorm", {})), command)
    _tell(ablation_table(results["summary"]), given)


@dataclass
class SweepFlags(flags.LabFlags):
    """Train shapes of equal parameters and compute, width and heads per Transformer block, with several residual
    connections, and show where each has its optimum.

    Writes results.json, table.csv and figures/ under --out. Called again after an interruption it continues.
    """


def _sweep(argv: Sequence[str], command: str) -> None:
    def start(given: flags.Values) -> flags.Values:
        return {"jobs": 2, "precision": "float32"}

    given = _parsed("sweep", argv, SweepConfig, SweepFlags, start, SHAPES)
    _tell(summary(sweep(given.make(SweepConfig, train=_without_shape(given)), command)), given)


@dataclass
class DynamicsFlags(flags.LabFlags, flags.PresetFlags):
    """Train residual connections and look inside at every validation: loss, and output and gradient magnitude of each
    Transformer block, over the training.

    Writes results.json, figures/ and dynamics.html, a page with a slider, under --out. Called again after an
    interruption it continues.
    """

    validate_every: int = 20
    """Steps between looks inside, each with a validation."""


def _dynamics(argv: Sequence[str], command: str) -> None:
    def start(given: flags.Values) -> flags.Values:
        return {"jobs": 2, **flags.of_preset(given)}

    given = _parsed("dynamics", argv, CompareConfig, DynamicsFlags, start, ("longer_baseline",))
    dynamics(comparison(given), command)
    print(f"results: {given['out'] / 'dynamics.html'}, {given['out'] / 'figures'}", file=sys.stderr)


def _parsed(
    name: str,
    argv: Sequence[str],
    config: type[Experiment],
    own: type[flags.LabFlags],
    start: Callable[[flags.Values], flags.Values],
    without: Sequence[str] = (),
) -> flags.Given:
    def with_out(given: flags.Values) -> flags.Values:
        return {"out": Path("runs", name), **start(given)}

    return flags.parse(f"lab {name}", argv, config, own, start=with_out, without=(*flags.SET_BY_LAB, *without))


def _named(presets: dict[str, flags.Values], given: flags.Values) -> flags.Values:
    name = given.get("preset") or "cpu"
    if name not in presets:
        raise UsageError(f"--preset must be one of {', '.join(presets)}; it is {name!r}")
    return presets[name]


def _without_shape(given: flags.Given) -> TrainConfig:
    """What the runs share where the experiment makes their shapes."""
    longest = min(max(1, given["context"]), MOST)  # TrainConfig refuses what lies beyond, by its own name
    return given.make(TrainConfig, model=DecoderConfig(max_position_embeddings=longest))


def _tell(text: str, given: flags.Given) -> None:
    print(text)
    print(f"\nresults: {given['out'] / 'results.json'}", file=sys.stderr)


EXPERIMENTS = {
    "scaling": (_scaling, "scaling laws over sizes, and the compute that AttnRes saves"),
    "ablation": (_ablation, "every row of the paper's ablation, over seeds"),
    "sweep": (_sweep, "which width and heads per block are best, at equal parameters and compute"),
    "dynamics": (_dynamics, "loss and magnitudes per block over a training, with a slider"),
}


def run(argv: Sequence[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        rows = "\n".join(f"  {name:<10} {text}" for name, (_, text) in EXPERIMENTS.items())
        print(f"usage: attnres lab EXPERIMENT [--help] ...\n\n{rows}")
        return 0 if argv else 2
    if argv[0] not in EXPERIMENTS:
        raise UsageError(f"there is no experiment {argv[0]!r}; there are {', '.join(EXPERIMENTS)}")
    EXPERIMENTS[argv[0]][0](argv[1:], shlex.join(["attnres", "lab", *argv]))
    return 0
