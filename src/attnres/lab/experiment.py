"""What experiments share: the training that their runs have in common, seeds, and the way from runs to results."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from .. import residual as residuals
from ..errors import UsageError, check_each_once
from ..model import DecoderConfig
from ..model.config import MOST
from ..run.config import TrainConfig
from .grid import Cell, check_limits, opened, provenance, run_grid
from .worker import Measure, train_and_probe

E = TypeVar("E", bound="Experiment")


@dataclass
class Experiment:
    """A grid of runs. Raises UsageError for a value outside its range, or a list that is empty or repeats itself."""

    train: TrainConfig = field(default_factory=TrainConfig)
    """What every run shares; its residual connection, seed and folder are set by the experiment."""
    seeds: tuple[int, ...] = (0,)
    """Seeds, separated by commas; several show mean and spread."""
    jobs: int = 1
    """Runs at the same time, which share the cores of a CPU."""
    minutes: float | None = None
    """Stop after so many minutes, with everything saved; the next call continues."""

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            values = getattr(self, f.name)
            if isinstance(values, list | tuple):
                setattr(self, f.name, tuple(values))
                check_each_once(**{f.name: values})
        entries: tuple[str, ...] = getattr(self, "residuals", ())
        parsed = [residuals.named(entry) for entry in entries]
        if any(one in parsed[:i] for i, one in enumerate(parsed)):
            raise UsageError(f"residuals must name each once; two of {', '.join(entries)!r} are the same")
        check_limits(self.jobs, self.minutes)

    def cells(self) -> Sequence[Cell]:
        """The runs, in the order in which they are done."""
        raise NotImplementedError

    def check(self) -> None:
        """Raises UsageError for runs that cannot be done."""
        for cell in self.cells():
            cell.config.model.check_residual()

    def sized(self, width: int, residual: str, **shape: Any) -> DecoderConfig:
        """A decoder for the corpus and context of the runs; residual: a name, options behind it."""
        name, options = residuals.named(residual)
        return DecoderConfig(
            vocab_size=self.train.model.vocab_size,
            hidden_size=width,
            max_position_embeddings=max(512, self.train.context),
            initializer_range=round(0.7 * min(max(1, width), MOST) ** -0.5, 3),
            residual=name,
            residual_options=options,
            **shape,
        )


def folder(residual: str) -> str:
    """A name of files for a residual connection with options behind its name."""
    return residual.replace(":", "-")


@contextmanager
def conducted(
    experiment: E, command: str, *, keep_checkpoints: bool = False, measure: Measure = train_and_probe
) -> Iterator[tuple[E, list[dict[str, Any]], dict[str, Any]]]:
    """The experiment with its training as `opened` gives it, what `run_grid` returns, and where its numbers were
    made. Within, no other process can open the folder of the experiment."""
    experiment.check()
    with opened(experiment.train) as (train, corpus):
        experiment = dataclasses.replace(experiment, train=train)
        experiment.check()
        found = run_grid(
            experiment.cells(),
            jobs=experiment.jobs,
            minutes=experiment.minutes,
            keep_checkpoints=keep_checkpoints,
            measure=measure,
        )
        yield experiment, found, provenance(train, corpus, command)
