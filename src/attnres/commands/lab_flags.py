"""Flags that the commands which train more than one model share."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import tyro

from ..errors import UsageError
from ..parallel.config import ParallelConfig
from ..run.config import RunConfig


@dataclass
class SeededFlags(RunConfig):
    """What a run has, but for what these commands set themselves."""

    seeds: str = "0"
    """Seeds, separated by commas; several show mean and spread."""
    out: Path = Path("runs/lab")
    """Folder of all runs and of what is found in them."""
    seed: tyro.conf.SuppressFixed[tyro.conf.Fixed[int]] = 0
    parallel: tyro.conf.SuppressFixed[tyro.conf.Fixed[ParallelConfig]] = field(default_factory=ParallelConfig)
    config: Path | None = None
    """YAML file with any of these settings; flags win over it."""


@dataclass
class GridFlags(SeededFlags):
    """A grid of runs side by side."""

    jobs: int = 1
    """Runs at the same time, which share the cores of a CPU."""
    minutes: float | None = None
    """Stop after so many minutes, with everything saved; the next call continues."""


@dataclass
class MatchedFlags(GridFlags):
    """A grid whose runs are as long as their compute or parameters say."""

    residuals: str = "prenorm,block_attnres,full_attnres"
    """Residual connections, separated by commas; the first is the baseline."""
    steps: tyro.conf.SuppressFixed[tyro.conf.Fixed[int]] = 180
    validate_every: tyro.conf.SuppressFixed[tyro.conf.Fixed[int]] = 60


def names_of(residuals: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in residuals.split(","))


def seeds_of(text: str) -> tuple[int, ...]:
    """Raises UsageError if one is no whole number."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise UsageError(f"--seeds must be whole numbers separated by commas; it is {text!r}") from error
