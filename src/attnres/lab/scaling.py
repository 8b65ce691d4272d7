"""Scaling laws over sizes, residual connections and seeds, each size with the same data and schedule for all."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

import numpy as np

from ..analysis.draw.figures import save
from ..analysis.draw.scaling_figure import scaling_figure
from ..errors import UsageError
from ..model import DecoderConfig
from ..run.config import TrainConfig
from ..text_table import markdown
from .experiment import Experiment, conducted, folder
from .grid import Cell, write_csv, write_json
from .power_law import PowerLaw, bootstrap, compute_advantage, fit_power_law, interval

FLOP_UNIT = 1e12
MATCHED = 0.1  # largest difference of FLOPs a token to the baseline's at equal size
DRAWS = 1000
COLUMNS = ("size", "residual", "seed", "parameters", "tokens", "compute_tflop", "val_loss")


@dataclass(frozen=True)
class Size:
    """One model size: width D, Transformer blocks, attention heads, and the learning rate of the baseline there."""

    width: int
    blocks: int
    heads: int
    lr: float

    @property
    def name(self) -> str:
        return f"{self.width}x{self.blocks}"

    def __str__(self) -> str:
        return f"{self.name}x{self.heads}@{self.lr:g}"

    @classmethod
    def read(cls, text: str) -> Size:
        """The size that WIDTHxBLOCKSxHEADS@LR spells. Raises UsageError."""
        try:
            shape, rate = text.split("@")
            width, blocks, heads = (int(part) for part in shape.split("x"))
            return cls(width, blocks, heads, float(rate))
        except ValueError as error:
            raise UsageError(f"--sizes must be WIDTHxBLOCKSxHEADS@LR, such as 64x5x4@3e-3; it is {text!r}") from error


@dataclass
class ScalingConfig(Experiment):
    """The grid. `train` is what every run shares; a size sets the shape, the learning rate and the steps."""

    sizes: tuple[Size, ...] = ()
    """Sizes as WIDTHxBLOCKSxHEADS@LR, separated by commas; a size's learning rate serves all residual connections."""
    residuals: tuple[str, ...] = ("prenorm", "block_attnres", "full_attnres")
    """Residual connections, separated by commas, options behind a name as in block_attnres:num_blocks=4; the first is
    the baseline."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds, separated by commas; several show mean and spread."""
    tokens_per_parameter: float = 3.0
    """Training tokens of a size, per activated parameter (without embeddings) of the baseline."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.tokens_per_parameter <= 1e9:
            raise UsageError(f"tokens_per_parameter must be positive, at most 1e9; it is {self.tokens_per_parameter}")

    def places(self) -> list[tuple[Size, str, int]]:
        """Size, residual connection and seed of every run, smallest sizes first."""
        sizes = sorted(self.sizes, key=self.compute)
        return [(size, name, seed) for size in sizes for seed in self.seeds for name in self.residuals]

    def cells(self) -> list[Cell]:
        return [
            Cell(f"{size.name}, {name}, seed {seed}", dataclasses.replace(self.run(size, name, seed), keep=1))
            for size, name, seed in self.places()
        ]

    def run(self, size: Size, residual: str, seed: int) -> TrainConfig:
        """One training of the grid."""
        model = self._model(size, residual)
        steps = round(self.tokens_per_parameter * self._activated(size) / self.train.tokens_per_step)
        if steps < 2:
            raise UsageError(
                f"size {size.name} would train for {steps} steps of {self.train.tokens_per_step:,} tokens; raise "
                "tokens_per_parameter or lower batch_size"
            )
        return dataclasses.replace(
            self.train,
            model=model,
            seed=seed,
            steps=steps,
            validate_every=max(1, steps // 4),
            optim=dataclasses.replace(self.train.optim, lr=size.lr),
            out=self.train.out / "runs" / f"{size.name}-{folder(residual)}-seed{seed}",
        )

    def compute(self, size: Size) -> float:
        """Training compute of a size in FLOP, counted on the baseline: what all its runs are matched to."""
        run = self.run(size, self.residuals[0], self.seeds[0])
        return run.steps * run.tokens_per_step * run.model.flops_per_token(run.context)

    def check(self) -> None:
        """Raises UsageError for a grid that cannot be compute-matched, or is too small to fit."""
        if len({self.compute(size) for size in self.sizes}) < 3:
            raise UsageError(f"a power law needs at least 3 sizes of different compute; there are {len(self.sizes)}")
        for size in self.sizes:
            base = self._model(size, self.residuals[0]).flops_per_token(self.train.context)
            for residual in self.residuals:
                self._model(size, residual).check_residual()
                own = self._model(size, residual).flops_per_token(self.train.context)
                if abs(own / base - 1) > MATCHED:
                    raise UsageError(
                        f"the grid cannot be compute-matched: a token costs {residual} {own / base:.2f} times the "
                        f"FLOPs of {self.residuals[0]} at size {size.name}, more than {MATCHED:.0%} apart; take wider "
                        "sizes or another residual connection"
                    )

    def _model(self, size: Size, residual: str) -> DecoderConfig:
        shape = dict(num_hidden_layers=size.blocks, num_attention_heads=size.heads)
        return self.sized(size.width, residual, **shape)

    def _activated(self, size: Size) -> int:
        return self._model(size, self.residuals[0]).parameter_counts()["activated"]


def scaling(config: ScalingConfig, command: str = "") -> dict[str, Any]:
    """Trains the grid, smallest sizes first, fits, and writes results.json, table.csv and figures/ under train.out.

    Calling again continues the grid. Returns the contents of results.json. Raises UsageError for bad input before any
    run, Failure where runs fail or time is up.
    """
    out = config.train.out
    with conducted(config, command) as (config, found, head):
        places = zip(config.places(), found, strict=True)
        runs = [{"size": size.name, **result, "residual": name} for (size, name, _), result in places]
        sizes = list(dict.fromkeys(size for size, *_ in config.places()))
        compute = {size.name: config.compute(size) / FLOP_UNIT for size in sizes}
        results = {
            **head,
            "jobs": config.jobs,
            "tokens_per_parameter": config.tokens_per_parameter,
            "baseline": config.residuals[0],
            "sizes": [_described(config, size) for size in sizes],
            "runs": runs,
            **analyse(runs, compute, config.residuals),
        }
        write_json(out / "results.json", results)
        rows = [{**run, "compute_tflop": compute[run["size"]]} for run in runs]
        write_csv(out / "table.csv", rows, COLUMNS)
        save(scaling_figure(results), out / "figures", "scaling")
    return results


def analyse(runs: Sequence[dict[str, Any]], compute: dict[str, float], names: Sequence[str]) -> dict[str, Any]:
    """Fits of each residual connection with and without an irreducible loss, and the advantage over the first at the
    largest compute, with 95 % bootstrap intervals; compute in TFLOP by size. Too few sizes for the irreducible loss
    leave that fit out."""
    x = list(compute.values())
    seeds = sorted({run["seed"] for run in runs})
    losses = {(run["size"], run["residual"], run["seed"]): run["val_loss"] for run in runs}
    tables = {name: np.array([[losses[size, name, seed] for seed in seeds] for size in compute]) for name in names}
    largest = max(x)
    found: dict[str, Any] = {"compute_unit": "TFLOP", "compute": compute, "fits": {}}
    for kind, irreducible in (("power_law", False), ("with_irreducible", True)):
        if irreducible and len(x) < 4:
            continue
        draws = bootstrap(x, tables, irreducible=irreducible, draws=DRAWS if not irreducible else DRAWS // 5)
        flat = np.repeat(x, len(seeds))
        laws = {name: fit_power_law(flat, table.ravel(), irreducible=irreducible) for name, table in tables.items()}
        found["fits"][kind] = [
            _fitted(name, laws, draws, names[0], largest, x if not irreducible else None) for name in names
        ]
    return found


def _fitted(
    name: str,
    laws: dict[str, PowerLaw],
    draws: dict[str, list[PowerLaw]],
    baseline: str,
    largest: float,
    band: Sequence[float] | None,
) -> dict[str, Any]:
    law, own = laws[name], draws[name]
    gains = [compute_advantage(base, fit, largest) for base, fit in zip(draws[baseline], own, strict=True)]
    entry: dict[str, Any] = {
        "residual": name,
        **dataclasses.asdict(law),
        "A_interval": interval([fit.A for fit in own]),
        "alpha_interval": interval([fit.alpha for fit in own]),
        "irreducible_interval": interval([fit.irreducible for fit in own]),
        "advantage_at": largest,
        "advantage": compute_advantage(laws[baseline], law, largest),
        "advantage_interval": interval(gains),
    }
    if band is not None:
        grid = np.geomspace(min(band), max(band), 25).tolist()
        entry["band"] = {
            "compute": grid,
            "loss": [law.loss(c) for c in grid],
            "interval": [interval([fit.loss(c) for fit in own]) for c in grid],
            "difference_interval": [
                interval([fit.loss(c) - base.loss(c) for base, fit in zip(draws[baseline], own, strict=True)])
                for c in grid
            ],
        }
    return entry


def _described(config: ScalingConfig, size: Size) -> dict[str, Any]:
    run = config.run(size, config.residuals[0], config.seeds[0])
    return {
        **dataclasses.asdict(size),
        "size": size.name,
        "activated_parameters": run.model.parameter_counts()["activated"],
        "tokens": run.steps * run.tokens_per_step,
        "steps": run.steps,
        "compute_tflop": config.compute(size) / FLOP_UNIT,
        "flops_ratio": {
            name: config.run(size, name, 0).model.flops_per_token(run.context) / run.model.flops_per_token(run.context)
            for name in config.residuals
        },
    }


def table(results: dict[str, Any]) -> str:
    """Losses by size and fits as tables in Markdown."""
    names = list(dict.fromkeys(run["residual"] for run in results["runs"]))
    sizes = [["size", "activated", "tokens", "TFLOP", *names]]
    for size in results["sizes"]:
        counts = [f"{size['activated_parameters']:,}", f"{size['tokens']:,}", f"{size['compute_tflop']:.3g}"]
        sizes.append([size["size"], *counts])
        for name in names:
            own = [r["val_loss"] for r in results["runs"] if (r["size"], r["residual"]) == (size["size"], name)]
            spread = f" ({min(own):.4f} .. {max(own):.4f})" if len(own) > 1 else ""
            sizes[-1].append(f"{mean(own):.4f}{spread}")
    laws = [["fit", "residual", "A", "alpha", "irreducible", "compute advantage"]]
    for kind, fits in results["fits"].items():
        for fit in fits:
            irreducible = _within(fit, "irreducible", ".3f") if kind == "with_irreducible" else ""
            gain = "" if fit["residual"] == results["baseline"] else _within(fit, "advantage", ".2f", "x")
            numbers = [_within(fit, "A", ".3f"), _within(fit, "alpha", ".4f"), irreducible, gain]
            laws.append([kind.replace("_", " "), fit["residual"], *numbers])
    return "\n".join([*markdown(sizes), "", *markdown(laws)])


def _within(fit: dict[str, Any], name: str, digits: str, unit: str = "") -> str:
    low, high = fit[f"{name}_interval"]
    return f"{fit[name]:{digits}}{unit} ({low:{digits}} .. {high:{digits}})"
