"""What the runs of an upgrade come to: differences with their standard errors, and whether it helped."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from statistics import mean, stdev
from typing import Any

from .config import PLAIN, UpgradeConfig

ERRORS = 2.0
"""So many standard errors are noise."""
HELPED, NOT, NOISE = "helped", "did not help", "within noise"


def summarise(runs: Sequence[dict[str, Any]], arms: Sequence[str]) -> list[dict[str, Any]]:
    """One row an arm, plain first; losses are means over seeds, in nats per scored token.

    "difference": to the plain arm, seed by seed and row by row. "standard_error": of that, over the held-out rows
    ("rows_error") and, with several seeds, over these too ("seeds_error"). "seconds": of training, by the median step.
    "plain_at_equal_time": what the plain arm's own curve comes to in that time; None where it has none.
    """
    by_arm = {arm: [run for run in runs if run["residual"] == arm] for arm in arms}
    plain = by_arm[PLAIN]
    rows = []
    for arm, own in by_arm.items():
        values = [run["val_loss"] for run in own]
        gaps = [a["val_loss"] - b["val_loss"] for a, b in zip(own, plain, strict=True)]
        over_rows = _error_over_rows(own, plain)
        over_seeds = stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else None
        error = math.hypot(over_rows, over_seeds or 0.0)
        took = _seconds(own)
        rows.append(
            {
                "residual": arm,
                "seeds": [run["seed"] for run in own],
                "parameters": own[0]["parameters"],
                "trained_parameters": own[0]["trained_parameters"],
                "tokens": own[0]["tokens"],
                "first_loss": mean(run["val_curve"]["val_loss"][0] for run in own),
                "val_loss": mean(values),
                "val_loss_spread": max(values) - min(values) if len(values) > 1 else None,
                "difference": mean(gaps),
                "difference_spread": max(gaps) - min(gaps) if len(gaps) > 1 else None,
                "rows_error": over_rows,
                "seeds_error": over_seeds,
                "standard_error": error,
                "verdict": None if arm == PLAIN else verdict(gaps, error),
                "seconds": took,
                "plain_at_equal_time": _plain_at(took, plain),
                "throughput_ratio": _ratio(own, plain),
                "peak_memory_bytes": max(run["peak_memory_bytes"] for run in own),
            }
        )
    return rows


def verdict(gaps: Sequence[float], error: float) -> str:
    """Of the differences to the plain arm, one a seed: they must agree and their mean be beyond two standard errors."""
    gap = mean(gaps)
    if not abs(gap) > ERRORS * error or len({value < 0 for value in gaps}) > 1:
        return NOISE
    return HELPED if gap < 0 else NOT


def finding(summary: Sequence[dict[str, Any]], config: UpgradeConfig, rows: int) -> str:
    """One honest line for each converted arm."""
    plain = summary[0]
    lines = []
    for row in summary[1:]:
        gap, error = row["difference"], row["standard_error"]
        said = {HELPED: "helped", NOT: "did not help", NOISE: "made no difference beyond noise"}[row["verdict"]]
        rival = "the model as it was" if plain["tokens"] == 0 else "the unconverted model on the same data"
        seeds = f"{len(config.seeds)} seeds" if len(config.seeds) > 1 else "one seed, whose luck is not in it"
        lines.append(
            f"{row['residual']} {said}: held-out loss {row['val_loss']:.4f} against {plain['val_loss']:.4f} of "
            f"{rival}, difference {gap:+.4f} +- {error:.4f} (standard error over {rows} held-out rows; {seeds})"
        )
        if row["plain_at_equal_time"] is not None:
            lines[-1] += f"; in the same time that one would be at about {row['plain_at_equal_time']:.4f}"
    return ". ".join(lines) + "."


def loss_at(seconds: float, curve: Sequence[tuple[float, float]]) -> float | None:
    """The loss that a curve of (seconds, loss) comes to: linear over the logarithm of time between its points, and
    beyond the last two along their line. None in front of the first, and of a curve with fewer than two of them."""
    points = [(at, loss) for at, loss in curve if at > 0]
    if len(points) < 2 or seconds < points[0][0]:
        return None
    for (t0, l0), (t1, l1) in pairwise(points):
        if seconds <= t1 or t1 == points[-1][0]:
            return l0 + (l1 - l0) * math.log(seconds / t0) / math.log(t1 / t0)
    raise AssertionError("the last pair is always taken")


def _error_over_rows(own: Sequence[dict[str, Any]], plain: Sequence[dict[str, Any]]) -> float:
    """Standard error of the difference of two mean losses per token, over rows that both were measured on; of several
    seeds each row's mean difference."""
    counts = [count for _, count in own[0]["window_losses"]]
    gaps = [
        mean(a[0] - b[0] for a, b in row)
        for row in zip(
            *(zip(a["window_losses"], b["window_losses"], strict=True) for a, b in zip(own, plain, strict=True)),
            strict=True,
        )
    ]
    middle = sum(gaps) / sum(counts)
    squares = sum((gap - middle * count) ** 2 for gap, count in zip(gaps, counts, strict=True))
    return math.sqrt(squares * len(gaps) / (len(gaps) - 1)) / sum(counts)


def _seconds(runs: Sequence[dict[str, Any]]) -> float | None:
    if any(run["seconds_per_step"] is None for run in runs):
        return None
    return mean(run["seconds_per_step"] * run["val_curve"]["step"][-1] for run in runs)


def _plain_at(seconds: float | None, plain: Sequence[dict[str, Any]]) -> float | None:
    if seconds is None or _seconds(plain) is None:
        return None
    pace = mean(run["seconds_per_step"] for run in plain)
    steps = plain[0]["val_curve"]["step"]
    losses = [mean(run["val_curve"]["val_loss"][i] for run in plain) for i in range(len(steps))]
    return loss_at(seconds, [(pace * step, loss) for step, loss in zip(steps, losses, strict=True)])


def _ratio(own: Sequence[dict[str, Any]], plain: Sequence[dict[str, Any]]) -> float | None:
    pairs = [(a["tokens_per_second"], b["tokens_per_second"]) for a, b in zip(own, plain, strict=True)]
    return None if any(None in pair for pair in pairs) else mean(a / b for a, b in pairs)
