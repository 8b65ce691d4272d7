"""The figure of scaling laws, from the results of `attnres lab scaling`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .style import WIDTH, apply_style, looks

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def scaling_figure(results: dict[str, Any]) -> Figure:
    """Validation loss (nats per token) over training compute (TFLOP), both logarithmic: a mark a run, the fitted power
    laws with their 95 % bootstrap bands; below, the same minus the baseline's fit, and its runs of the same seeds."""
    named, compute = looks(results), results["compute"]
    fits = {fit["residual"]: fit for fit in results["fits"]["power_law"]}
    losses = {(run["size"], run["residual"], run["seed"]): run["val_loss"] for run in results["runs"]}
    baseline = results["baseline"]
    with apply_style():
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

        figure = Figure(figsize=(WIDTH, 3.6), layout="constrained")
        top, bottom = figure.subplots(nrows=2, sharex=True, height_ratios=[2, 1.25])
        for name, look in named.items():
            band = fits[name]["band"]
            low, high = np.array(band["interval"]).T
            top.fill_between(band["compute"], low, high, color=look.colour, alpha=0.18, linewidth=0)
            top.plot(band["compute"], band["loss"], color=look.colour)
            points = [(compute[size], loss) for (size, own, _), loss in losses.items() if own == name]
            top.plot(*zip(*points, strict=True), look.marker, color=look.colour, alpha=0.75, markeredgewidth=0)
            label = f"{look.label}: {fits[name]['A']:.2f} C$^{{-{fits[name]['alpha']:.3f}}}$"
            top.plot([], [], color=look.colour, marker=look.marker, label=label)
            if name == baseline:
                continue
            low, high = np.array(band["difference_interval"]).T
            bottom.fill_between(band["compute"], low, high, color=look.colour, alpha=0.18, linewidth=0)
            bottom.plot(band["compute"], np.array(band["loss"]) - fits[baseline]["band"]["loss"], color=look.colour)
            for (size, own, seed), loss in losses.items():
                if own == name:
                    bottom.plot(compute[size], loss - losses[size, baseline, seed], look.marker, color=look.colour,
                                alpha=0.75, markeredgewidth=0)  # fmt: skip
        bottom.axhline(0, color=named[baseline].colour, linewidth=1.2)
        top.set_xscale("log")
        top.set_yscale("log")
        top.yaxis.set_major_locator(LogLocator(subs=(1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 7)))
        top.yaxis.set_major_formatter(ScalarFormatter())
        top.yaxis.set_minor_formatter(NullFormatter())
        top.set_ylabel("Validation loss\n(nats per token)")
        bottom.set_ylabel(f"Minus {named[baseline].label}\n(nats per token)")
        bottom.set_xlabel("Training compute C (TFLOP)")
        figure.align_ylabels()
        figure.legend(*top.get_legend_handles_labels(), loc="outside upper left", ncols=1)
    return figure
