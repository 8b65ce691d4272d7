"""Magnitudes per Transformer block over a training, from the results of `attnres lab dynamics`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .style import HEAT_MAP, apply_style, colour_bar, looks, plain_log_ticks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LABELS = {"output_magnitude": "Output magnitude (RMS)", "gradient_magnitude": "Gradient magnitude (RMS)"}


def profiles(results: dict[str, Any], residual: str, profile: str) -> tuple[list[int], np.ndarray]:
    """Steps [P], and the mean over seeds of a magnitude [P, Transformer blocks]."""
    runs = [run["dynamics"] for run in results["runs"] if run["residual"] == residual]
    return runs[0]["step"], np.mean([run[profile] for run in runs], axis=0)


def dynamics_figure(results: dict[str, Any], profile: str) -> Figure:
    """Heat maps of `profile`, "output_magnitude" or "gradient_magnitude" (RMS, mean over seeds), Transformer blocks
    over training steps: a panel a residual connection, one logarithmic colour scale."""
    named = looks(results)
    columns = min(3, len(named))
    rows = -(-len(named) // columns)
    with apply_style():
        from matplotlib.colors import LogNorm
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator

        tables = {name: profiles(results, name, profile) for name in named}
        positive = np.concatenate([values[values > 0] for _, values in tables.values()])
        norm = LogNorm(positive.min(), max(positive.max(), positive.min() * 1.01))
        figure = Figure(figsize=(1.15 * columns + 1.0, 1.75 * rows + 0.3), layout="constrained")
        panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
        for axes in panels.flat[len(named) :]:
            axes.set_visible(False)
        for axes, (name, look) in zip(panels.flat, named.items(), strict=False):
            steps, values = tables[name]
            mesh = axes.pcolormesh(steps, np.arange(1, values.shape[1] + 1), values.T, norm=norm, cmap=HEAT_MAP,
                                   shading="nearest", rasterized=True)  # fmt: skip
            axes.set_title(look.label)
            axes.grid(False)
            axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=3))
        figure.supxlabel("Step", fontsize=8)
        figure.supylabel("Transformer block", fontsize=8)
        plain_log_ticks(colour_bar(figure, mesh, panels, LABELS[profile]).ax.yaxis)
    return figure
