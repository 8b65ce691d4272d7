"""The paper's ablation (section 8) as one grid: every row, over seeds, on one corpus."""

from __future__ import annotations

import csv
import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from ..analysis.draw.ablation_figure import block_size_figure
from ..analysis.draw.figures import save
from ..errors import UsageError
from ..model import DecoderConfig, DecoderShape
from ..run.config import TrainConfig
from .grid import Cell, opened, provenance, run_grid, write_json


class Row(NamedTuple):
    """A row: its name, the mechanism, its options, and the paper's validation loss at 436M parameters."""

    name: str
    residual: str
    options: dict[str, Any]
    paper: float


SIZES = {2: 1.746, 4: 1.746, 8: 1.748, 16: 1.753, 32: 1.757}
"""Block sizes of the sweep, in layers, with the paper's losses."""


def rows(model: DecoderShape) -> list[Row]:
    """The rows of the paper that fit the model: a block has at most half of the layers, and heads divide the width."""
    heads = math.gcd(16, model.hidden_size)
    found = [
        Row("baseline", "prenorm", {}, 1.766),
        Row("DenseFormer", "denseformer", {}, 1.767),
        Row("mHC", "mhc", {}, 1.747),
        Row("Full", "full_attnres", {}, 1.737),
        Row("Full, input-dependent query", "full_attnres", {"query": "input"}, 1.731),
        Row("Full, input-independent mixing", "full_attnres", {"mixing": "static"}, 1.749),
        Row("Full, sigmoid", "full_attnres", {"mixing": "sigmoid"}, 1.741),
        Row("Full, no norm on keys", "full_attnres", {"key_normalised": False}, 1.743),
        Row("Full, window of 8", "full_attnres", {"window": 8}, 1.764),
        Row("Block S=4", "block_attnres", {"block_size": 4}, 1.746),
        Row(f"Block S=4, {heads} heads", "block_attnres", {"block_size": 4, "heads": heads}, 1.752),
        Row("Block S=4, no norm on keys", "block_attnres", {"block_size": 4, "key_normalised": False}, 1.750),
    ]
    sizes = [size for size in SIZES if size != 4 and size <= model.num_layers]
    return [*found, *(Row(f"Block S={size}", "block_attnres", {"block_size": size}, SIZES[size]) for size in sizes)]


@dataclass
class AblationConfig:
    """The grid: what every run shares, and the seeds."""

    train: TrainConfig
    """What every run shares; its residual connection, seed and folder are set by the grid."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds; each repeats every row with other initial weights and another data order."""
    jobs: int = 1
    """Runs at the same time."""
    minutes: float | None = None
    """Stop after so many minutes, to be continued by the next call."""
    chosen: list[Row] = field(init=False)

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise UsageError(f"seeds must name at least one, each once; it is {', '.join(map(str, self.seeds))!r}")
        if self.jobs < 1:
            raise UsageError(f"jobs must be a positive whole number; it is {self.jobs}")
        if self.minutes is not None and not self.minutes > 0:
            raise UsageError(f"minutes must be positive; it is {self.minutes}")
        self.chosen = rows(self.train.model)

    def cells(self) -> list[tuple[Row, Cell]]:
        """Every row with every seed, seeds outermost: a grid that is cut short has whole seeds."""
        shape = {f.name: getattr(self.train.model, f.name) for f in dataclasses.fields(DecoderShape)}
        return [(row, self._cell(row, seed, shape)) for seed in self.seeds for row in self.chosen]

    def _cell(self, row: Row, seed: int, shape: dict[str, Any]) -> Cell:
        model = DecoderConfig(**shape, residual=row.residual, residual_options=row.options)
        model.check_residual()
        folder = "".join(c if c.isalnum() else "-" for c in row.name.lower()).replace("--", "-")
        out = self.train.out / "runs" / f"{folder}-seed{seed}"
        return Cell(f"{row.name}, seed {seed}", dataclasses.replace(self.train, model=model, seed=seed, out=out))


def ablation(config: AblationConfig, command: str = "") -> dict[str, Any]:
    """Trains every cell and writes results.json, table.csv, table.md and figures/block_size.{png,svg} under train.out.

    Calling again continues the grid. Returns the contents of results.json. Raises UsageError for bad input, Failure
    where runs fail or time is up.
    """
    out = config.train.out
    with opened(config.train) as (train, corpus):
        config = dataclasses.replace(config, train=train)
        pairs = config.cells()
        found = run_grid([cell for _, cell in pairs], jobs=config.jobs, minutes=config.minutes, keep_checkpoints=False)
        runs = [{"row": row.name, **result} for (row, _), result in zip(pairs, found, strict=True)]
        results = {
            **provenance(train, corpus, command),
            "jobs": config.jobs,
            "rows": [row._asdict() for row in config.chosen],
            "runs": runs,
            "summary": summarise(runs, config.chosen),
        }
        write_json(out / "results.json", results)
        _write_csv(out / "table.csv", results["summary"])
        (out / "table.md").write_text(table(results["summary"]) + "\n")
        save(block_size_figure(results), out / "figures", "block_size")
    return results


def summarise(runs: Sequence[dict[str, Any]], chosen: Sequence[Row]) -> list[dict[str, Any]]:
    """One entry a row. Differences are to the baseline of the same seed, so that what a seed does to both cancels.

    `verdict`: "better" or "worse" where the differences of all seeds have one sign and there are at least two,
    otherwise "inside the spread".
    """
    losses = {(run["row"], run["seed"]): run["val_loss"] for run in runs}
    seeds = sorted({run["seed"] for run in runs})
    first = chosen[0]
    entries = []
    for row in chosen:
        own = [losses[row.name, seed] for seed in seeds]
        differences = [losses[row.name, seed] - losses[first.name, seed] for seed in seeds]
        entries.append(
            {
                "row": row.name,
                "residual": row.residual,
                "options": row.options,
                "parameters": next(run["parameters"] for run in runs if run["row"] == row.name),
                "val_loss": mean(own),
                "val_loss_min": min(own),
                "val_loss_max": max(own),
                "difference": mean(differences),
                "difference_min": min(differences),
                "difference_max": max(differences),
                "verdict": "" if row is first else _verdict(differences),
                "paper_loss": row.paper,
                "paper_difference": row.paper - first.paper,
            }
        )
    return entries


def _verdict(differences: Sequence[float]) -> str:
    if len(differences) > 1 and (max(differences) < 0 or min(differences) > 0):
        return "better" if differences[0] < 0 else "worse"
    return "inside the spread"


def table(summary: Sequence[dict[str, Any]]) -> str:
    """The summary as a table in Markdown."""
    lines = [
        "| row | validation loss | difference to the baseline | over seeds | | paper's difference |",
        "|---|---|---|---|---|---|",
    ]
    for entry in summary:
        spread = f"{entry['difference_min']:+.4f} .. {entry['difference_max']:+.4f}"
        first = entry is summary[0]
        cells = [
            entry["row"],
            f"{entry['val_loss']:.4f} ({entry['val_loss_min']:.4f} .. {entry['val_loss_max']:.4f})",
            "" if first else f"{entry['difference']:+.4f}",
            "" if first else spread,
            entry["verdict"],
            f"{entry['paper_loss']:.3f}" if first else f"{entry['paper_difference']:+.3f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _write_csv(path: Path, summary: Sequence[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(summary[0]))
        writer.writeheader()
        writer.writerows(summary)
