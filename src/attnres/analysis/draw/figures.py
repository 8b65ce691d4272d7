"""Figures of a comparison, in one style: results dictionary in, matplotlib Figure out.

Figures are built without pyplot, so neither the backend nor the rcParams of the caller change.
They are the ones by which "Attention Residuals" (arXiv 2603.15031) looks at trained models.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import Failure, UsageError
from .style import HEAT_MAP, HEAT_TICKS, PAPER, SOFT, WIDTH, Look, apply_style, bare, colour_bar, looks, plain_log_ticks

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

START = 0.1  # share of the training whose steep losses the loss figure lets run out of the frame


def runs_of(results: dict, residual: str) -> list[dict]:
    """The runs of one mechanism, one per seed."""
    return [run for run in results["runs"] if run["residual"] == residual]


def _numbers(values: list) -> np.ndarray:
    return np.array([np.nan if value is None else value for value in values], dtype=float)


def _curves(runs: list[dict], curve: str, value: str) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [P] at which every run has a value, and those values [runs, P]; a run that ended early shortens all."""
    tables = [dict(zip(run[curve]["tokens"], _numbers(run[curve][value]), strict=True)) for run in runs]
    tokens = sorted(set.intersection(*(set(table) for table in tables)))
    return np.array(tokens, dtype=float), np.array([[table[x] for x in tokens] for table in tables])


def _profiles(runs: list[dict], key: str) -> np.ndarray:
    return np.array([_numbers(run[key]) for run in runs if run.get(key)])


def _new(height: float, **grid: Any) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots(**grid)


def _band(axes: Axes, x: np.ndarray, values: np.ndarray, look: Look) -> None:
    """Mean over seeds as a marked line; the range from the lowest to the highest seed as a band."""
    if not values.size:
        return
    if len(values) > 1:
        axes.fill_between(x, values.min(0), values.max(0), color=look.colour, alpha=0.18, linewidth=0)
    every = max(1, len(x) // 16)
    axes.plot(x, values.mean(0), color=look.colour, marker=look.marker, markevery=every, label=look.label)


def _log_if_wide(axes: Axes, values: list[np.ndarray]) -> None:
    """A logarithmic y axis where positive values span more than a factor of ten."""
    flat = np.concatenate([value.ravel() for value in values]) if values else np.array([])
    flat = flat[np.isfinite(flat)]
    if flat.size and flat.min() > 0 and flat.max() > 10 * flat.min():
        axes.set_yscale("log")
        plain_log_ticks(axes.yaxis)


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=3)


def loss_curves(results: dict) -> Figure:
    """Loss (nats per token) over training tokens: validation marked, training faint, band over seeds.

    Mechanisms differ by a small part of the loss, so a second panel shows validation loss minus the baseline's, seed by
    seed. The first tenth of the training leaves the first panel at the top, or its fall would flatten everything else.

    Raises:
        UsageError: `results` holds no runs, or matplotlib is not installed.
    """
    named = looks(results)
    baseline = results.get("baseline")
    rivals = [name for name in named if name != baseline and baseline in named]
    with apply_style():
        figure, panels = _new(3.3 if rivals else 2.3, nrows=2 if rivals else 1, sharex=True, squeeze=False,
                              height_ratios=[2, 1.25] if rivals else [1])  # fmt: skip
        top, bottom = panels[0, 0], panels[-1, 0]
        late = []
        for name, look in named.items():
            tokens, training = _curves(runs_of(results, name), "curve", "loss")
            if training.size:
                top.plot(tokens / 1e6, training.mean(0), color=look.colour, alpha=0.28, linewidth=0.7)
            tokens, validation = _curves(runs_of(results, name), "val_curve", "val_loss")
            _band(top, tokens / 1e6, validation, look)
            late.append(validation[:, tokens >= START * tokens.max(initial=0)])
        _longer(top, results, named)
        values = np.concatenate([value[np.isfinite(value)] for value in late])
        if values.size and np.ptp(values) > 0:
            top.set_ylim(values.min() - 0.1 * np.ptp(values), values.max() + 0.1 * np.ptp(values))
        top.set_ylabel("Loss (nats per token)")
        if rivals:
            _differences(bottom, results, named)
        bottom.set_xlabel("Training tokens (millions)")
        figure.align_ylabels()
        _legend(figure, top)
    return figure


def _longer(axes: Axes, results: dict, named: dict[str, Look]) -> None:
    """The longer run of the baseline, a thin line."""
    longer, baseline = results.get("longer_baseline"), results.get("baseline")
    if longer and baseline in named:
        tokens, validation = _curves(longer["runs"], "val_curve", "val_loss")
        style: dict[str, Any] = {"color": named[baseline].colour, "linewidth": 0.9, "linestyle": "--"}
        label = f"{longer['times']:g}\N{MULTIPLICATION SIGN}"
        if validation.size:
            axes.plot(tokens / 1e6, validation.mean(0), label=label, **style)


def _differences(axes: Axes, results: dict, named: dict[str, Look]) -> None:
    base = {run["seed"]: run for run in runs_of(results, results["baseline"])}
    axes.axhline(0, color=named[results["baseline"]].colour, linewidth=1.4)
    for name, look in named.items():
        pairs = [(run, base[run["seed"]]) for run in runs_of(results, name) if run["seed"] in base]
        if name == results["baseline"] or not pairs:
            continue
        tokens, values = _curves([run for pair in pairs for run in pair], "val_curve", "val_loss")
        if values.size:
            _band(axes, tokens / 1e6, values[::2] - values[1::2], look)
    axes.set_ylabel(f"Validation loss\nminus {named[results['baseline']].label}")


def _per_block(results: dict, key: str, label: str) -> Figure:
    named = looks(results)
    with apply_style():
        from matplotlib.ticker import MaxNLocator

        figure, axes = _new(2.3)
        profiles = {name: _profiles(runs_of(results, name), key) for name in named}
        for name, values in profiles.items():
            _band(axes, np.arange(1, values.shape[-1] + 1), values, named[name])
        _log_if_wide(axes, list(profiles.values()))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.set_xlabel("Transformer block")
        axes.set_ylabel(label)
        _legend(figure, axes)
    return figure


def output_magnitude(results: dict) -> Figure:
    """RMS of each Transformer block's output (no unit), over depth; logarithmic if it spans more than a factor of ten.

    Raises:
        UsageError: `results` holds no runs, or matplotlib is not installed.
    """
    return _per_block(results, "output_magnitude", "Output magnitude (RMS)")


def gradient_magnitude(results: dict) -> Figure:
    """RMS of d loss / d output of each Transformer block (nats per unit of output), over depth.

    Raises:
        UsageError: `results` holds no runs, or matplotlib is not installed.
    """
    return _per_block(results, "gradient_magnitude", "Gradient magnitude (RMS)")


def attending(results: dict) -> list[str]:
    """The mechanisms that recorded depth-attention weights."""
    return [name for name in looks(results) if any(run.get("depth_weights") for run in runs_of(results, name))]


def weight_grid(results: dict, residual: str) -> tuple[np.ndarray, np.ndarray]:
    """Depth-attention weights, mean over seeds: grid [L + 1 reads, sources], NaN where a read has no such source,
    and a mask of the same shape that marks partial sums.

    Row i is layer i's read, the last row the output's; all NaN where a layer has none. Column 0 is the embedding,
    column n layer n or block n. The partial sum of block n stands in column n, as the finished block does later. Of
    consecutive reads with equally many sources the last is the first after a block was finished; the others end in a
    partial sum, all but the output's where the first layer has no read.

    Raises:
        UsageError: no run of `residual` has depth weights.
    """
    seeds = [run["depth_weights"] for run in runs_of(results, residual) if run.get("depth_weights")]
    if not seeds:
        raise UsageError(f"residual: {residual!r} has no depth weights in these results; known: {attending(results)}")
    lengths = [len(row) for row in seeds[0]]
    grid = np.full((len(lengths), max(lengths)), np.nan)
    partial = np.zeros(grid.shape, dtype=bool)
    rows = [i for i, length in enumerate(lengths) if length]
    for i, after in zip(rows, [*rows[1:], None], strict=True):
        grid[i, : lengths[i]] = np.mean([_numbers(weights[i]) for weights in seeds], axis=0)
        partial[i, lengths[i] - 1] = after is not None and (rows[0] > 0 or lengths[after] == lengths[i])
    return grid, partial


def depth_attention(results: dict, residual: str) -> Figure:
    """Heat maps of one mechanism's depth-attention weights (no unit, each read sums to 1): reads before attention and
    before the MLP side by side, one colour scale, proportional to the square root so that small weights stay visible.

    Raises:
        UsageError: no run of `residual` has depth weights, or matplotlib is not installed.
    """
    grid, partial = weight_grid(results, residual)
    layers, sources = len(grid) - 1, grid.shape[1]
    with apply_style():
        from matplotlib.colors import PowerNorm

        figure, panels = _new(2.5, ncols=2)
        rows = (layers + 1) // 2
        style: dict[str, Any] = {"cmap": HEAT_MAP, "norm": PowerNorm(0.5, 0, 1)}
        # large cells have gaps between them; many small ones are an image, which looks the same in a smaller file
        style |= {"edgecolors": PAPER, "linewidth": min(0.4, 6 / sources)} if sources <= 32 else {"rasterized": True}
        for axes, first, title in zip(panels, (0, 1), ("before attention", "before MLP"), strict=True):
            reads = list(range(first, layers, 2))
            places = [*range(len(reads)), *([rows + 0.4] if first == 0 else [])]  # the output stands a little apart
            for read, y in zip([*reads, layers], places, strict=False):
                mesh = axes.pcolormesh(np.arange(sources + 1), [y, y + 1], grid[read : read + 1], **style)
                x = np.flatnonzero(partial[read])
                axes.plot(x + 0.5, np.full(len(x), y + 0.5), ".", color=SOFT, markeredgecolor=PAPER,
                          markeredgewidth=0.3, markersize=3.5)  # fmt: skip
            step = -(-len(reads) // 12)
            names = [str(read + 1) for read in reads[::step]] + (["output"] if first == 0 else [])
            axes.set_yticks([y + 0.5 for y in places[: len(reads) : step] + places[len(reads) :]], names)
            axes.set_ylim(rows + 1.4, 0)
            step = 2 if sources <= 12 else 4 * -(-sources // 32)
            axes.set_xticks(np.arange(0, sources, step) + 0.5, ["emb", *map(str, range(step, sources, step))])
            axes.set_title(title)
            bare(axes)
        panels[0].set_ylabel("Reading layer")
        kind = "layer" if sources == layers + 1 else "block (dot: sum still growing)"
        figure.supxlabel(f"Source: embedding, {kind}", fontsize=8)
        bar = colour_bar(figure, mesh, panels, "Mean weight", ticks=HEAT_TICKS)
        bar.ax.set_yticklabels([f"{tick:g}" for tick in HEAT_TICKS])
    return figure


def save(figure: Figure, out_dir: str | Path, name: str) -> list[Path]:
    """Write `figure` as out_dir/name.png (300 dots per inch) and out_dir/name.svg; the folder is made if needed.

    Raises:
        Failure: the files cannot be written.
    """
    paths = [Path(out_dir) / f"{name}.{suffix}" for suffix in ("png", "svg")]
    try:
        paths[0].parent.mkdir(parents=True, exist_ok=True)
        with apply_style():
            for path in paths:
                figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    except OSError as error:
        raise Failure(f"cannot write figure {name!r} to {out_dir}: {error.strerror or error}") from error
    return paths


def write_figures(results: dict, out_dir: str | Path) -> list[Path]:
    """Draw every figure that `results` has data for and save each as PNG and SVG in `out_dir`; returns the paths.

    Raises:
        UsageError: `results` holds no runs, or matplotlib is not installed.
        Failure: the files cannot be written.
    """
    draw: dict[str, Callable[[dict], Figure]] = {"loss": loss_curves}
    for key, function in (("output_magnitude", output_magnitude), ("gradient_magnitude", gradient_magnitude)):
        if any(run.get(key) for run in results.get("runs", [])):
            draw[key] = function
    paths = [path for name, function in draw.items() for path in save(function(results), out_dir, name)]
    for name in attending(results):
        paths += save(depth_attention(results, name), out_dir, f"depth_attention_{name.replace(':', '-')}")
    return paths
