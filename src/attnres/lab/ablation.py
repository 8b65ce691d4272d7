"""The paper's ablation (section 8) as one grid: every row, over seeds, on one corpus."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any, NamedTuple

from ..analysis.draw.ablation_figure import block_size_figure
from ..analysis.draw.figures import save
from ..model import DecoderConfig
from ..text_table import markdown
from .experiment import Experiment, conducted
from .grid import Cell, write_csv, write_json


class Row(NamedTuple):
    """A row: its name, the mechanism, its options, and the paper's validation loss at 436M parameters."""

    name: str
    residual: str
    options: dict[str, Any]
    paper: float


SIZES = {2: 1.746, 4: 1.746, 8: 1.748, 16: 1.753, 32: 1.757}
"""Block sizes of the sweep, in layers, with the paper's losses."""


def rows(model: DecoderConfig) -> list[Row]:
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
class AblationConfig(Experiment):
    """The grid: every row with every seed."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds, separated by commas; each repeats every row with other initial weights and another data order."""

    def places(self) -> list[tuple[Row, int]]:
        """Seeds outermost: a grid that is cut short has whole seeds."""
        return [(row, seed) for seed in self.seeds for row in rows(self.train.model)]

    def cells(self) -> list[Cell]:
        return [self._cell(row, seed) for row, seed in self.places()]

    def _cell(self, row: Row, seed: int) -> Cell:
        model = dataclasses.replace(self.train.model, residual=row.residual, residual_options=row.options)
        folder = "".join(c if c.isalnum() else "-" for c in row.name.lower()).replace("--", "-")
        out = self.train.out / "runs" / f"{folder}-seed{seed}"
        return Cell(f"{row.name}, seed {seed}", dataclasses.replace(self.train, model=model, seed=seed, out=out))


def ablation(config: AblationConfig, command: str = "") -> dict[str, Any]:
    """Trains every cell and writes results.json, table.csv, table.md and figures/block_size.{png,svg} under train.out.

    Calling again continues the grid. Returns the contents of results.json. Raises UsageError for bad input, Failure
    where runs fail or time is up.
    """
    out = config.train.out
    with conducted(config, command) as (config, found, head):
        runs = [{"row": row.name, **result} for (row, _), result in zip(config.places(), found, strict=True)]
        chosen = rows(config.train.model)
        summary = summarise(runs, chosen)
        results = {
            **head,
            "jobs": config.jobs,
            "rows": [row._asdict() for row in chosen],
            "runs": runs,
            "summary": summary,
        }
        write_json(out / "results.json", results)
        write_csv(out / "table.csv", summary, list(summary[0]))
        (out / "table.md").write_text(table(summary) + "\n")
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
    heads = ["row", "validation loss", "difference to the baseline", "over seeds", "", "paper's difference"]
    cells = [heads]
    for entry in summary:
        first = entry is summary[0]
        cells.append(
            [
                entry["row"],
                f"{entry['val_loss']:.4f} ({entry['val_loss_min']:.4f} .. {entry['val_loss_max']:.4f})",
                "" if first else f"{entry['difference']:+.4f}",
                "" if first else f"{entry['difference_min']:+.4f} .. {entry['difference_max']:+.4f}",
                entry["verdict"],
                f"{entry['paper_loss']:.3f}" if first else f"{entry['paper_difference']:+.3f}",
            ]
        )
    return "\n".join(markdown(cells))
