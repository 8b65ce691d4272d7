"""Which shape does a residual connection like? Fixed parameters and compute, width and heads per Transformer block.

The architecture sweep of "Attention Residuals" (arXiv 2603.15031): d_model / L_b against heads / L_b.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from ..analysis.draw.figures import save
from ..analysis.draw.sweep_figure import sweep_figure
from ..errors import UsageError
from ..model import DecoderConfig
from ..model.config import MOST_ELEMENTS
from ..run.config import TrainConfig
from .experiment import Experiment, conducted, folder
from .grid import Cell, write_csv, write_json

MATCHED = 0.05  # largest part by which parameters or compute may differ from the target
COLUMNS = ("width_ratio", "head_ratio", "residual", "seed", "parameters", "tokens", "val_loss")


@dataclass
class SweepConfig(Experiment):
    """The grid. `train` is what every run shares; a cell sets the shape and, by its FLOPs a token, the steps."""

    widths: tuple[float, ...] = (4, 8, 12, 16, 24)
    """Ratios d_model / L_b, separated by commas; the paper has 15,30,45,60,75 at 230M parameters."""
    heads: tuple[float, ...] = (0.3, 0.4, 0.5, 0.6, 0.7)
    """Ratios heads / L_b, separated by commas."""
    residuals: tuple[str, ...] = ("prenorm", "full_attnres")
    """Residual connections, separated by commas, options behind a name as in block_attnres:num_blocks=4; the first is
    the baseline."""
    parameters: int = 300_000
    """Activated parameters of the baseline in each cell, without embeddings."""
    compute: float = 1e12
    """Training compute of each run in FLOP, counted on the baseline."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("widths", "heads"):
            if not all(1e-6 <= value <= 1e6 for value in getattr(self, name)):
                raise UsageError(f"{name} must be positive ratios, 1e-6 to 1e6; it is {getattr(self, name)}")
        if not (1 <= self.parameters <= MOST_ELEMENTS and 0 < self.compute < math.inf):
            raise UsageError(
                f"parameters and compute must be positive, parameters at most {MOST_ELEMENTS}; they are "
                f"{self.parameters} and {self.compute}"
            )

    def places(self) -> list[tuple[float, float, str, int]]:
        """The ratios of width and heads, the residual connection and the seed of every cell."""
        return [
            (width, heads, name, seed)
            for seed in self.seeds
            for width in self.widths
            for heads in self.heads
            for name in self.residuals
        ]

    def cells(self) -> list[Cell]:
        """Without those that round to a shape that is there already."""
        runs = {run.out: run for run in (self.run(*place) for place in self.places())}
        return [Cell(run.out.name.replace("-", ", ", 1), run) for run in runs.values()]

    def model(self, width_ratio: float, head_ratio: float, residual: str) -> DecoderConfig:
        """The shape of a cell: rounded to whole numbers, and the MLP's inner width takes up what is left."""
        blocks = max(1, round((self.parameters / (12 * width_ratio**2)) ** (1 / 3)))
        width = max(2, 2 * round(width_ratio * blocks / 2))
        heads = max(1, round(head_ratio * blocks))
        head_dim = max(2, 2 * round(width / heads / 2))
        inner = round((self.parameters / blocks - 4 * width * heads * head_dim) / (3 * width))
        if inner < width / 2:
            raise UsageError(
                f"{self.parameters:,} parameters leave no room for an MLP at d_model/L_b {width_ratio:g} and heads/L_b "
                f"{head_ratio:g}; leave this ratio out or raise parameters"
            )
        shape = dict(num_hidden_layers=blocks, num_attention_heads=heads, head_dim=head_dim, intermediate_size=inner)
        return self.sized(width, residual, **shape)

    def run(self, width_ratio: float, head_ratio: float, residual: str, seed: int) -> TrainConfig:
        """One training of the grid. Cells that round to one shape share it."""
        model = self.model(width_ratio, head_ratio, residual)
        flops = self.model(width_ratio, head_ratio, self.residuals[0]).flops_per_token(self.train.context)
        steps = round(self.compute / (flops * self.train.tokens_per_step))
        if steps < 2:
            raise UsageError(f"compute {self.compute:.3g} FLOP is {steps} steps; raise compute or lower batch_size")
        shape = f"{model.hidden_size}x{model.num_hidden_layers}x{model.num_attention_heads}"
        return dataclasses.replace(
            self.train,
            model=model,
            seed=seed,
            steps=steps,
            validate_every=steps,
            keep=1,
            out=self.train.out / "runs" / f"{shape}-{folder(residual)}-seed{seed}",
        )

    def check(self) -> None:
        """Raises UsageError for a grid whose cells cannot have equal parameters and compute."""
        for width in self.widths:
            for heads in self.heads:
                run = self.run(width, heads, self.residuals[0], self.seeds[0])
                count = run.model.parameter_counts()["activated"]
                spent = run.steps * run.tokens_per_step * run.model.flops_per_token(run.context)
                for name, own, target in (
                    ("parameters", count, self.parameters),
                    ("compute", spent, self.compute),
                ):
                    if abs(own / target - 1) > MATCHED:
                        raise UsageError(
                            f"the grid cannot be matched: at d_model/L_b {width:g} and heads/L_b {heads:g} the {name} "
                            f"are {own:.3g} and not {target:.3g}; raise parameters or compute, or leave this ratio out"
                        )
                for residual in self.residuals:
                    self.model(width, heads, residual).check_residual()


def sweep(config: SweepConfig, command: str = "") -> dict[str, Any]:
    """Trains the grid and writes results.json, table.csv and figures/sweep.{png,svg} under train.out.

    Calling again continues. Returns the contents of results.json; "best" has each residual connection's best cell.
    Raises UsageError for bad input before any run, Failure where runs fail or time is up.
    """
    out = config.train.out
    with conducted(config, command) as (config, found, head):
        by_folder = dict(zip((cell.config.out for cell in config.cells()), found, strict=True))
        runs = [
            {
                "width_ratio": width,
                "head_ratio": heads,
                **by_folder[config.run(width, heads, name, seed).out],
                "residual": name,
            }
            for width, heads, name, seed in config.places()
        ]
        results = {
            **head,
            "jobs": config.jobs,
            "baseline": config.residuals[0],
            "parameters": config.parameters,
            "compute_flop": config.compute,
            "widths": list(config.widths),
            "heads": list(config.heads),
            "shapes": [_described(config, width, heads) for width in config.widths for heads in config.heads],
            "runs": runs,
            "best": {name: best(runs, name) for name in config.residuals},
        }
        write_json(out / "results.json", results)
        write_csv(out / "table.csv", runs, COLUMNS)
        save(sweep_figure(results), out / "figures", "sweep")
    return results


def best(runs: Sequence[dict[str, Any]], residual: str) -> dict[str, float]:
    """The cell of the lowest mean validation loss over seeds."""
    losses: dict[tuple[float, float], list[float]] = {}
    for run in runs:
        if run["residual"] == residual:
            losses.setdefault((run["width_ratio"], run["head_ratio"]), []).append(run["val_loss"])
    width, heads = min(losses, key=lambda place: mean(losses[place]))
    return {"width_ratio": width, "head_ratio": heads, "val_loss": mean(losses[width, heads])}


def summary(results: dict[str, Any]) -> str:
    """The best cells, and in how many cells each residual connection beats the baseline."""
    lines = []
    losses: dict[tuple[str, float, float], list[float]] = {}
    for run in results["runs"]:
        losses.setdefault((run["residual"], run["width_ratio"], run["head_ratio"]), []).append(run["val_loss"])
    places = [(width, heads) for width in results["widths"] for heads in results["heads"]]
    for name, cell in results["best"].items():
        text = "best at d_model/L_b {width_ratio:g}, heads/L_b {head_ratio:g}: {val_loss:.4f}".format(**cell)
        if name != results["baseline"]:
            gains = [mean(losses[results["baseline"], *place]) - mean(losses[name, *place]) for place in places]
            wins = sum(gain > 0 for gain in gains)
            text += f"; lower loss in {wins} of {len(gains)} cells, by {min(gains):+.4f} to {max(gains):+.4f}"
        lines.append(f"{name}: {text}")
    return "\n".join(lines)


def _described(config: SweepConfig, width: float, heads: float) -> dict[str, Any]:
    run = config.run(width, heads, config.residuals[0], config.seeds[0])
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim", "intermediate_size")
    return {
        "width_ratio": width,
        "head_ratio": heads,
        **{name: getattr(run.model, name) for name in sizes},
        "activated_parameters": run.model.parameter_counts()["activated"],
        "tokens": run.steps * run.tokens_per_step,
    }
