"""The heat maps of an architecture sweep, from the results of `attnres lab sweep`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .style import INK, PAPER, apply_style, bare, colour_bar, looks

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def loss_grid(results: dict[str, Any], residual: str) -> np.ndarray:
    """Validation losses, mean over seeds: [heads / L_b, d_model / L_b]."""
    losses: dict[tuple[float, float], list[float]] = {}
    for run in results["runs"]:
        if run["residual"] == residual:
            losses.setdefault((run["head_ratio"], run["width_ratio"]), []).append(run["val_loss"])
    return np.array([[np.mean(losses[heads, width]) for width in results["widths"]] for heads in results["heads"]])


def sweep_figure(results: dict[str, Any]) -> Figure:
    """Heat maps of the validation loss (nats per token) side by side, one colour scale; a star marks the best cell of
    each, a ring that of the baseline, so that the shift of the optimum shows."""
    named = looks(results)
    grids = {name: loss_grid(results, name) for name in named}
    low, high = (extreme([extreme(grid) for grid in grids.values()]) for extreme in (np.min, np.max))
    widths, heads = results["widths"], results["heads"]
    with apply_style():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(1.4 * len(named) + 0.9, 2.1), layout="constrained")
        panels = figure.subplots(ncols=len(named), squeeze=False, sharey=True)[0]
        home = np.unravel_index(np.argmin(grids[results["baseline"]]), grids[results["baseline"]].shape)
        for axes, (name, look) in zip(panels, named.items(), strict=True):
            grid = grids[name]
            mesh = axes.pcolormesh(grid, cmap="YlGnBu_r", vmin=low, vmax=high, edgecolors=PAPER, linewidth=0.4)
            y, x = np.unravel_index(np.argmin(grid), grid.shape)
            for colour, width in ((PAPER, 2.6), (INK, 1.1)):  # seen on light and on dark cells
                axes.plot(home[1] + 0.5, home[0] + 0.5, "o", color=colour, fillstyle="none", markersize=9,
                          markeredgewidth=width)  # fmt: skip
            axes.plot(x + 0.5, y + 0.5, "*", color="#d55e00", markeredgecolor=PAPER, markersize=8, markeredgewidth=0.5)
            axes.set_title(look.label)
            axes.set_xticks(np.arange(len(widths)) + 0.5, [f"{width:g}" for width in widths])
            axes.set_yticks(np.arange(len(heads)) + 0.5, [f"{ratio:g}" for ratio in heads])
            bare(axes)
        panels[0].set_ylabel("heads / L$_b$")
        figure.supxlabel("d$_{model}$ / L$_b$", fontsize=8)
        colour_bar(figure, mesh, panels, "Validation loss\n(nats per token)")
    return figure
