"""Residual connections side by side: equal initial weights for all that they share, equal data, equal schedule."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import mean
from typing import Any

from .. import residual as residuals
from ..analysis.draw.figures import write_figures
from ..analysis.draw.report import write_report
from ..analysis.measure.worth import worth
from ..errors import UsageError
from ..run.config import TrainConfig
from .experiment import Experiment, conducted, folder
from .grid import Cell, write_json


@dataclass
class CompareConfig(Experiment):
    """The same training run for several residual connections and seeds."""

    residuals: tuple[str, ...] = ("prenorm", "block_attnres", "full_attnres")
    """Residual connections, separated by commas; the first is the baseline. Options may stand behind a name, as in
    block_attnres:num_blocks=4:reads=mlp."""
    residual_options: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Options of a residual connection, by its name; those behind a name win over them."""
    longer_baseline: float | None = None
    """Train the first residual connection once more on so many times the tokens, such as 1.25: what the others gain is
    then told in tokens too."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.longer_baseline is not None and not 1 < self.longer_baseline <= 100:
            raise UsageError(f"longer_baseline must be over 1 and at most 100; it is {self.longer_baseline}")

    def places(self) -> list[tuple[str, int]]:
        """Residual connection and seed of every run, seeds outermost."""
        return [(residual, seed) for seed in self.seeds for residual in self.residuals]

    def runs(self) -> list[TrainConfig]:
        """One configuration for each of the places, then those of the longer baseline."""
        return [cell.config for cell in self.cells()]

    def _run(self, residual: str, seed: int) -> TrainConfig:
        name, own = residuals.named(residual)
        options = self.residual_options.get(name, {}) | own
        model = dataclasses.replace(self.train.model, residual=name, residual_options=options)
        out = self.train.out / "runs" / f"{folder(residual)}-seed{seed}"
        return dataclasses.replace(self.train, model=model, seed=seed, out=out)

    def _longer(self, seed: int, times: float) -> TrainConfig:
        run = self._run(self.residuals[0], seed)
        out = run.out.with_name(f"{folder(self.residuals[0])}-x{times:g}-seed{seed}")
        return dataclasses.replace(run, steps=round(times * run.steps), out=out)

    def cells(self) -> list[Cell]:
        cells = [Cell(f"{residual}, seed {seed}", self._run(residual, seed)) for residual, seed in self.places()]
        if times := self.longer_baseline:
            name = f"{self.residuals[0]}, {times:g} times the tokens"
            cells += [Cell(f"{name}, seed {seed}", self._longer(seed, times)) for seed in self.seeds]
        return cells

    def named(self, found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """The results of the runs, each under the name of its residual connection here, options included; without
        those of the longer baseline."""
        return [{**run, "residual": residual} for run, (residual, _) in zip(found, self.places(), strict=False)]


def compare(config: CompareConfig, command: str = "") -> dict[str, Any]:
    """Trains every run, each in a process of its own, and writes results.json, figures/ and report.html under
    train.out.

    A run that is finished is not repeated, one that was cut off goes on from its checkpoint: calling again after a kill
    continues the comparison. Returns the contents of results.json. Raises UsageError for bad input and Failure where a
    run fails.
    """
    out = config.train.out
    with conducted(config, command, keep_checkpoints=True) as (config, found, head):
        runs = config.named(found)
        longer: dict[str, Any] | None = None
        if config.longer_baseline:
            longer = {"times": config.longer_baseline, "runs": found[len(runs) :]}
        results = {
            **head,
            "model": config.runs()[0].model.to_dict(),
            "baseline": config.residuals[0],
            "runs": runs,
            **({"longer_baseline": longer} if longer else {}),
            "summary": summarise(runs, config.residuals, longer),
        }
        write_json(out / "results.json", results)
        write_figures(results, out / "figures")
        write_report(results, out)
    return results


def summarise(
    runs: Sequence[dict[str, Any]], names: Sequence[str], longer: dict[str, Any] | None = None
) -> list[dict[str, Any]]:
    """One row a residual connection; differences and ratios are to the first one, paired by seed, then averaged.

    longer: the runs of the first one on some "times" the tokens. "worth" is then how many times its tokens the first
    one needs for the loss of the row, None where that cannot be told.
    """
    by_name = {name: {run["seed"]: run for run in runs if run["residual"] == name} for name in names}
    baseline = by_name[names[0]]
    curve = [(1.0, 0.0)]
    if longer is not None:
        curve.append(
            (longer["times"], mean(run["val_loss"] - baseline[run["seed"]]["val_loss"] for run in longer["runs"]))
        )
    rows = []
    for name, own in by_name.items():
        losses = [run["val_loss"] for run in own.values()]
        differences = [run["val_loss"] - baseline[seed]["val_loss"] for seed, run in own.items()]
        value = worth(mean(differences), curve)
        ratios = [run["tokens_per_second"] / baseline[seed]["tokens_per_second"] for seed, run in own.items()]
        first = next(iter(own.values()))
        rows.append(
            {
                "residual": name,
                "seeds": list(own),
                "parameters": first["parameters"],
                "tokens": first["tokens"],
                "val_loss": mean(losses),
                "val_loss_spread": max(losses) - min(losses) if len(losses) > 1 else None,
                "difference": mean(differences),
                "difference_spread": max(differences) - min(differences) if len(differences) > 1 else None,
                "throughput_ratio": mean(ratios),
                **({} if longer is None else {"worth": value if math.isfinite(value) else None}),
                "peak_memory_bytes": max(run["peak_memory_bytes"] for run in own.values()),
            }
        )
    return rows
