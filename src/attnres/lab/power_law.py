"""Scaling laws L = E + A C^-alpha: fits, their bootstrap intervals, and how much compute one saves over another."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from ..errors import UsageError


@dataclass(frozen=True)
class PowerLaw:
    """L = irreducible + A C^-alpha: loss in nats per token, compute C in the unit of the fit."""

    A: float
    alpha: float
    irreducible: float = 0.0

    def loss(self, compute: float) -> float:
        """The loss at that compute."""
        return self.irreducible + self.A * compute**-self.alpha

    def compute(self, loss: float) -> float:
        """The compute that this loss takes; infinite for one that is never reached."""
        if loss <= self.irreducible:
            return math.inf
        return ((loss - self.irreducible) / self.A) ** (-1 / self.alpha)


def fit_power_law(compute: ArrayLike, loss: ArrayLike, *, irreducible: bool = False) -> PowerLaw:
    """The least-squares line through (log C, log L), as in the paper's section 7; compute in any unit.

    With `irreducible` a constant E is fitted as well, from 0 to the lowest loss: for each E the line through
    (log C, log(L - E)), of which the one is taken whose losses are closest in log L. Raises UsageError for fewer than
    three different computes (four with `irreducible`) or values that are not positive.
    """
    x, y = np.asarray(compute, dtype=float), np.asarray(loss, dtype=float)
    if x.shape != y.shape or x.ndim != 1:
        raise UsageError(f"compute and loss must be equally long lists; they have shapes {x.shape} and {y.shape}")
    if not (np.isfinite(x).all() and np.isfinite(y).all() and (x > 0).all() and (y > 0).all()):
        raise UsageError("compute and loss must be positive and finite")
    need = 4 if irreducible else 3
    if (have := len(np.unique(x))) < need:
        kind = "a power law with an irreducible loss" if irreducible else "a power law"
        raise UsageError(f"{kind} needs at least {need} different computes; there are {have}: train more sizes")
    return _closest(x, y) if irreducible else _line(x, y, 0.0)


def compute_advantage(baseline: PowerLaw, other: PowerLaw, at: float) -> float:
    """How many times the compute `at` the baseline needs for the loss that `other` has there; above 1 is a gain."""
    return baseline.compute(other.loss(at)) / at


def bootstrap(
    compute: Sequence[float],
    losses: Mapping[str, np.ndarray],
    *,
    irreducible: bool = False,
    draws: int = 1000,
    seed: int = 0,
) -> dict[str, list[PowerLaw]]:
    """Fits to `draws` resamples of `losses`, by name [sizes, seeds]; compute is [sizes]. Raises what the fit raises.

    Each size draws from its seeds with replacement, the same ones for every name, so that what a seed does to all of
    them cancels in comparisons. With one seed it is the residuals of the fits that are drawn, over the sizes.
    """
    x = np.asarray(compute, dtype=float)
    tables = {name: np.asarray(table, dtype=float) for name, table in losses.items()}
    fits = {
        name: fit_power_law(np.repeat(x, table.shape[1]), table.ravel(), irreducible=irreducible)
        for name, table in tables.items()
    }
    generator = np.random.default_rng(seed)
    found: dict[str, list[PowerLaw]] = {name: [] for name in tables}
    seeds = next(iter(tables.values())).shape[1]
    for _ in range(draws):
        drawn = generator.integers(0, seeds, (len(x), seeds)) if seeds > 1 else generator.integers(0, len(x), len(x))
        for name, table in tables.items():
            if seeds > 1:
                y = np.take_along_axis(table, drawn, 1)
            else:
                expected = np.array([fits[name].loss(c) for c in x])
                y = (expected * (table[:, 0] / expected)[drawn])[:, None]
            found[name].append(fit_power_law(np.repeat(x, seeds), y.ravel(), irreducible=irreducible))
    return found


def interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """The central part of bootstrap values that holds `level` of them."""
    low, high = np.quantile(np.asarray(values, dtype=float), [(1 - level) / 2, (1 + level) / 2], method="nearest")
    return float(low), float(high)


def _line(x: np.ndarray, y: np.ndarray, constant: float) -> PowerLaw:
    log_x, log_y = np.log(x), np.log(y - constant)
    centred = log_x - log_x.mean()
    slope = float(centred @ log_y / (centred @ centred))
    return PowerLaw(float(np.exp(log_y.mean() - slope * log_x.mean())), -slope, constant)


def _closest(x: np.ndarray, y: np.ndarray) -> PowerLaw:
    def error(constant: float) -> float:
        law = _line(x, y, constant)
        return float(np.square(np.log(constant + law.A * x**-law.alpha) - np.log(y)).sum())

    low, high = 0.0, 0.999 * float(y.min())
    for _ in range(4):  # a grid, then finer ones about its best point: the error may have several valleys
        grid = np.linspace(low, high, 33)
        best = int(np.argmin([error(constant) for constant in grid]))
        low, high = grid[max(0, best - 1)], grid[min(len(grid) - 1, best + 1)]
    return _line(x, y, float(grid[best]))
