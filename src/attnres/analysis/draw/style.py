"""The one style of every figure: ink, palette, a fixed look per mechanism, matplotlib settings."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ...errors import UsageError

INK, SOFT, RULE, PAPER = "#1c1f23", "#5d6570", "#e3e6ea", "#ffffff"
HEAT_MAP = "YlGnBu"
HEAT_TICKS = (0, 0.05, 0.1, 0.25, 0.5, 1)
WIDTH = 3.4  # inches: half a column of a two-column page, so nothing has to be scaled down


@dataclass(frozen=True)
class Look:
    """How one mechanism appears in every figure: its name for readers, colour on light and dark paper, marker."""

    label: str
    colour: str
    dark: str
    marker: str


# Okabe and Ito's palette stays distinct under the common colour-vision deficiencies; markers repeat the distinction.
_LOOKS = {
    "plain": Look("Unconverted", "#6b7280", "#a9b2be", "o"),
    "prenorm": Look("PreNorm", "#6b7280", "#a9b2be", "o"),
    "full_attnres": Look("Full AttnRes", "#d55e00", "#ff8f4a", "s"),
    "block_attnres": Look("Block AttnRes", "#0072b2", "#56b4e9", "D"),
}
_SPARE = (
    ("#009e73", "#3ccf9f", "^"),
    ("#cc79a7", "#e6a3c8", "v"),
    ("#b8860b", "#e9bf4a", "P"),
    ("#7b5ea7", "#b7a1dc", "X"),
    ("#8c4a2f", "#d49a7e", "<"),
)

_STYLE: Any = {
    "font.family": "sans-serif",
    "font.sans-serif": ["Arial", "Helvetica", "Liberation Sans", "DejaVu Sans"],
    "font.size": 8,
    "axes.labelsize": 8,
    "axes.titlesize": 8,
    "legend.fontsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "axes.edgecolor": SOFT,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.minor.width": 0.4,
    "ytick.minor.width": 0.4,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "xtick.minor.size": 1.5,
    "ytick.minor.size": 1.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.4,
    "lines.markersize": 3,
    "legend.frameon": False,
    "legend.handlelength": 1.6,
    "legend.columnspacing": 1.6,
    "figure.facecolor": PAPER,
    "axes.facecolor": "none",
    "savefig.dpi": 300,
    "svg.fonttype": "path",
    "svg.hashsalt": "attnres",
}


def require_matplotlib() -> Any:
    """matplotlib; for what draws after long work to ask for before it.

    Raises:
        UsageError: it is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise UsageError("figures need matplotlib; install it with: pip install 'attnres[train]'") from None
    return matplotlib


@contextmanager
def apply_style() -> Iterator[None]:
    """Context in which matplotlib draws in this project's style; the caller's rcParams are back afterwards.

    Raises:
        UsageError: matplotlib is not installed.
    """
    with require_matplotlib().rc_context(_STYLE):
        yield


def plain_log_ticks(axis: Any) -> None:
    """Labels the ticks of a logarithmic matplotlib axis as numbers, 0.4 where matplotlib has 4 x 10^-1."""
    from matplotlib.ticker import LogFormatter

    class Plain(LogFormatter):
        def __call__(self, x: float, pos: int | None = None) -> str:
            return f"{x:g}" if super().__call__(x, pos) else ""

    axis.set_major_formatter(Plain())
    axis.set_minor_formatter(Plain())


def bare(axes: Any) -> None:
    """Leaves of a heat map's frame its labels alone: no grid, no ticks, no lines around it."""
    axes.grid(False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def colour_bar(figure: Any, mesh: Any, axes: Any, label: str, **options: Any) -> Any:
    """The colour scale of a heat map beside its axes; options are matplotlib's."""
    bar = figure.colorbar(mesh, ax=axes, aspect=24, pad=0.02, **options)
    bar.set_label(label)
    bar.outline.set_visible(False)
    return bar


def looks(results: dict) -> dict[str, Look]:
    """The look of each mechanism in `results`, in the order of their first runs.

    The paper's mechanisms have fixed colours; others take the remaining ones in order of appearance.

    Raises:
        UsageError: `results` holds no runs.
    """
    if not results.get("runs"):
        raise UsageError("results: no runs inside; give the contents of a results.json of `attnres compare`")
    names = list(dict.fromkeys(run["residual"] for run in results["runs"]))
    others = [name for name in names if name not in _LOOKS]
    spare = {name: Look(_label(name), *_SPARE[i % len(_SPARE)]) for i, name in enumerate(others)}
    return {name: _LOOKS.get(name) or spare[name] for name in names}


def _label(name: str) -> str:
    """For readers: a mechanism, then the options that stand behind its name."""
    mechanism, *options = name.split(":")
    look = _LOOKS.get(mechanism)
    return ", ".join([look.label if look else mechanism, *options])
