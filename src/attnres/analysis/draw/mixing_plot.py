"""The depth mixing matrix as a picture."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from ...errors import UsageError
from ..measure.mixing import semiseparable_rank
from .style import HEAT_MAP, WIDTH, apply_style, bare, colour_bar

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DIVERGING = "RdBu_r"
VISIBLE = 0.01
"""Weights and singular values below this share of the largest do not count in the figure."""


def mixing_figure(matrix: torch.Tensor, title: str = "") -> Figure:
    """Heat map of a depth mixing matrix [L + 1, L + 1]: reading layers down, outputs across, no unit.

    The title ends with the semiseparable rank, to a hundredth. Matrices with negative weights have two colours.

    Raises:
        UsageError: the matrix is not square, or matplotlib is not installed.
    """
    if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1]:
        raise UsageError(f"matrix must be square, [layers + 1, layers + 1]; it is {list(matrix.shape)}")
    size, rank = len(matrix), semiseparable_rank(matrix, VISIBLE).item()
    above = np.triu(np.ones((size, size), dtype=bool), 1)
    grid = np.ma.masked_array(matrix.detach().cpu().double().numpy(), mask=above)
    largest = float(np.abs(grid).max()) or 1.0
    with apply_style():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(WIDTH, WIDTH * 0.9), layout="constrained")
        axes = figure.subplots()
        low, colours = (-largest, DIVERGING) if grid.min() < -VISIBLE * largest else (0.0, HEAT_MAP)
        mesh = axes.pcolormesh(grid, cmap=colours, vmin=low, vmax=largest, rasterized=size > 33)
        axes.invert_yaxis()
        step = -(-size // 12)
        places = np.arange(0, size - 1, step)
        axes.set_xticks(places + 0.5, ["emb", *map(str, places[1:])])
        axes.set_yticks([*(places + 0.5), size - 0.5], [*map(str, places + 1), "output"])
        bare(axes)
        axes.set_ylabel("Reading layer")
        axes.set_xlabel("Embedding, output of layer")
        axes.set_title("\n".join([*filter(None, [title]), f"semiseparable rank {rank} of at most {(size + 1) // 2}"]))
        colour_bar(figure, mesh, axes, "Mean weight")
    return figure
