"""Figures of `reads.py`: what each form is worth against its cost, and what travels over depth within the models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from attnres.analysis.draw.style import apply_style, plain_log_ticks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = {
    "prenorm": "#6b7280",
    "block": "#0072b2",
    "block, Transformer blocks": "#009e73",
    "block, borders": "#cc79a7",
    "full": "#d55e00",
    "full, Transformer blocks": "#b8860b",
}


WORTH_COLOURS = COLOURS | {
    "block, MLPs, attentions the sum": "#56b4e9",
    "x0_lambdas": "#8b5a2b",
    "denseformer": "#7a5195",
}


def worth_figure(worths: dict[str, dict[float, float]], costs: dict[str, dict[str, float]]) -> Figure:
    """A panel a width: worth in tokens over the cost of a step, both to PreNorm's. A form is a line from its short run
    (open) to its long one (filled); above the diagonal it is worth more than it costs.

    worths: by form and length of the runs; costs: by width and form.
    """
    with apply_style():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7.0, 3.4), layout="constrained")
        panels = figure.subplots(1, len(costs), sharey=True, squeeze=False)[0]
        for axes, (width, cost) in zip(panels, costs.items(), strict=True):
            most = max(cost[form] for form in WORTH_COLOURS) + 0.03
            axes.plot([1, most], [1, most], color="#9aa1ab", linewidth=0.8, linestyle=":")
            for form, colour in WORTH_COLOURS.items():
                lengths = sorted(worths.get(form, {}))
                if form != "prenorm" and lengths:
                    values = [worths[form][length] for length in lengths]
                    at = [cost[form]] * len(lengths)
                    axes.plot(at, values, color=colour, linewidth=1)
                    axes.plot(at[:1], values[:1], "o", markerfacecolor="none", color=colour)
                    axes.plot(at[-1:], values[-1:], "o", color=colour, label=form)
            axes.set_ylim(0.98, max(max(by_length.values(), default=1) for by_length in worths.values()) + 0.04)
            axes.set_title(f"D = {width}")
            axes.set_xlabel("Cost of a step, to PreNorm's")
        panels[0].set_ylabel("Worth, of PreNorm's tokens")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def newest_weight(entry: dict[str, Any]) -> list[float]:
    """With which weight every layer sees the output before it; the plain sum: 1."""
    return [row[layer] for layer, row in enumerate(entry["mixing"][:-1])]


def embedding_weight(entry: dict[str, Any]) -> list[float]:
    return [row[0] for row in entry["mixing"][:-1]]


PANELS = {
    "Weight of the newest output": newest_weight,
    "Weight of the embedding": embedding_weight,
    "Input of a layer (RMS)": lambda entry: entry["input_rms"],
    "Gradient at its output (RMS)": lambda entry: entry["gradient_rms"],
}


def inside_figure(inside: Sequence[dict[str, Any]], length: float) -> Figure:
    """Four panels over the layers of the runs of one length, a line a form; means over tokens and seeds.

    Weights are those of the depth mixing matrix, in which PreNorm has ones.
    """
    found = {entry["form"]: entry for entry in inside if entry["length"] == length and entry["form"] in COLOURS}
    with apply_style():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7.0, 4.2), layout="constrained")
        panels = figure.subplots(2, 2, sharex=True)
        for axes, (title, values) in zip(panels.flat, PANELS.items(), strict=True):
            for form in COLOURS:
                if form in found:
                    line = values(found[form])
                    axes.plot(range(1, len(line) + 1), line, color=COLOURS[form], marker=".", label=form)
            axes.set_title(title)
            if title.endswith("(RMS)"):
                axes.set_yscale("log")
                plain_log_ticks(axes.yaxis)
        for axes in panels[1]:
            axes.set_xlabel("Layer")
        figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure
