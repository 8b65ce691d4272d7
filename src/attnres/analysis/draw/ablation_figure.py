"""The figure of the block-size sweep, from the results of `attnres lab ablation`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .style import WIDTH, apply_style, looks

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def block_size_figure(results: dict[str, Any]) -> Figure:
    """Validation loss (nats per token) over the block size S (S = 1 is Full): mean over seeds, band from the lowest to
    the highest; the baseline beside it."""
    losses: dict[str, list[float]] = {}
    for run in results["runs"]:
        losses.setdefault(run["row"], []).append(run["val_loss"])
    sizes = {1: losses["Full"]} | {
        row["options"]["block_size"]: losses[row["name"]]
        for row in results["rows"]
        if row["residual"] == "block_attnres" and set(row["options"]) == {"block_size"}
    }
    x = np.array(sorted(sizes))
    values = np.array([sizes[size] for size in x]).T
    named = looks(results)
    with apply_style():
        from matplotlib.figure import Figure
        from matplotlib.ticker import NullLocator

        figure = Figure(figsize=(WIDTH, 2.3), layout="constrained")
        axes = figure.subplots()
        baseline, look = np.array(losses["baseline"]), named["prenorm"]
        axes.axhspan(baseline.min(), baseline.max(), color=look.colour, alpha=0.18, linewidth=0)
        axes.axhline(baseline.mean(), color=look.colour, linestyle="--", label="PreNorm")
        look = named["block_attnres"]
        axes.fill_between(x, values.min(0), values.max(0), color=look.colour, alpha=0.18, linewidth=0)
        axes.plot(x, values.mean(0), color=look.colour, marker=look.marker, label="AttnRes in blocks of S layers")
        axes.set_xscale("log", base=2)
        axes.set_xticks(x, ["1\n(Full)", *map(str, x[1:])])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("Block size S (layers)")
        axes.set_ylabel("Validation loss\n(nats per token)")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=2)
    return figure
