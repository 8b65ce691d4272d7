"""What a lower loss is worth: how many times the tokens the plain model needs for it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise


def worth(difference: float, curve: Sequence[tuple[float, float]]) -> float:
    """How many times the tokens the baseline needs for a loss that is lower by -difference.

    Linear over the logarithm of the length between the points of `curve`, and beyond the last two along their line.
    NaN without two points, or between points where the loss does not fall.

    curve: (length of a run of the baseline, the first being 1; its loss minus that of the first), lengths ascending.
    """
    for (x0, d0), (x1, d1) in pairwise(curve):
        if difference >= d1 or (x1, d1) == curve[-1]:
            if d1 >= d0:
                break
            return math.exp(math.log(x0) + (difference - d0) / (d1 - d0) * math.log(x1 / x0))
    return math.nan


def in_words(worth: float | None, times: float) -> str:
    """A worth that was found by one run of `times` the tokens, between the two or as the side on which it lies."""
    if worth is None or math.isnan(worth):
        return "unknown"
    return "under 1" if worth < 1 else f"over {times:g}" if worth > times else f"{worth:.2f}"
