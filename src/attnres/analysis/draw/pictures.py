"""Pictures inside an HTML page: figures as inline SVG, depth-attention weights as coloured tables, small sketches."""

from __future__ import annotations

import io
import math
import re
from html import escape
from typing import TYPE_CHECKING

import numpy as np

from .style import HEAT_MAP, HEAT_TICKS, INK, PAPER, RULE, SOFT, Look, apply_style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HEAT_LEVELS = 16


def inline_svg(figure: Figure, prefix: str, label: str, named: dict[str, Look]) -> str:
    """`figure` as an SVG element for a page: text stays text, colours become the page's variables (so that it follows
    light and dark), ids carry `prefix` and only those that are referred to remain.

    Args:
        figure: a figure drawn in this project's style.
        prefix: unique in the page, letters only.
        label: what the picture shows, read out instead of it.
        named: the mechanisms' looks; the colour of the i-th becomes --m{i}.
    """
    buffer = io.StringIO()
    with apply_style():
        import matplotlib

        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": prefix}):
            figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    width, height = figure.get_size_inches() * 72
    svg = svg[svg.index(">", svg.index("<svg")) + 1 :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    referred = set(re.findall(r'(?:href="|url\()#([^")]+)', svg))
    svg = re.sub(r' id="([^"]+)"', lambda m: f' id="{prefix}-{m[1]}"' if m[1] in referred else "", svg)
    svg = re.sub(r'(?:xlink:)?(href="|url\()#', rf"\1#{prefix}-", svg)
    svg = re.sub(r"font-family: [^;\"]+(; )?", "", svg)
    svg = re.sub(r"<[^>]*>", lambda tag: re.sub(r"\d+\.\d{3,}", lambda m: f"{float(m[0]):.2f}", tag[0]), svg)
    variables = {INK: "var(--ink)", SOFT: "var(--soft)", RULE: "var(--rule)", PAPER: "none"}
    variables |= {look.colour: f"var(--m{i})" for i, look in enumerate(named.values())}
    for colour, variable in variables.items():
        svg = svg.replace(colour, variable)
    svg = re.sub(r"\s*\n\s*", "\n", svg)
    return f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(label)}">{svg}'


def heat_colours() -> tuple[list[str], list[str]]:
    """The heat levels' colours, lowest first, on light paper and on dark."""
    with apply_style():
        from matplotlib import colormaps
        from matplotlib.colors import to_hex

        light = [to_hex(colormaps[HEAT_MAP](i / (HEAT_LEVELS - 1))) for i in range(HEAT_LEVELS)]
    return light, light[::-1]


def _level(weight: float) -> int:
    return round((HEAT_LEVELS - 1) * math.sqrt(min(1.0, max(0.0, weight))))


def heat_tables(grid: np.ndarray, partial: np.ndarray) -> str:
    """Depth-attention weights as two tables of coloured cells: reads before attention, reads before the MLP.

    The output's read closes the first. The values are the cells' text, seen by assistive technology and by the page's
    script, which shows the one under the pointer or the arrow keys.

    Args:
        grid: [L + 1 reads, sources], NaN where a read has no such source.
        partial: mask of the same shape that marks partial sums.
    """
    layers, sources = len(grid) - 1, grid.shape[1]
    every = 1 if sources <= 12 else 4 * math.ceil(sources / 32)
    head = "".join(
        f'<th scope="col"><span{"" if n % every == 0 else " class=hide"}>{n or "emb"}</span></th>'
        for n in range(sources)
    )
    tables = []
    for first, title in ((0, "Before attention"), (1, "Before MLP")):
        body = [
            ("<tr class=last><th scope=row>output</th>" if read == layers else f"<tr><th scope=row>{read + 1}</th>")
            + "".join(_cell(weight, dot) for weight, dot in zip(grid[read], partial[read], strict=True))
            + "</tr>"
            for read in [*range(first, layers, 2), *([layers] if first == 0 else [])]
        ]
        tables.append(
            f"<table tabindex=0><caption>{title}</caption><thead><tr><td></td>{head}</tr></thead>\n"
            f"<tbody>{chr(10).join(body)}</tbody></table>"
        )
    return f'<div class="panels">{"".join(tables)}</div>'


def _cell(weight: float, dot: bool) -> str:
    if math.isnan(weight):
        return "<td></td>"
    return f'<td class="h{_level(weight)}{" p" if dot else ""}">{weight:.3f}</td>'


def heat_key(partial: bool) -> str:
    """The colour scale of the heat tables, and the dot where some sources are partial sums."""
    swatches = "".join(f'<span><i class="h{_level(tick)}"></i>{tick:g}</span>' for tick in HEAT_TICKS)
    dot = '<span><i class="p"></i>sum of its own block so far</span>' if partial else ""
    return f"<span>Weight{swatches}</span>{dot}"


def sketch(residual: str, index: int) -> str:
    """A thumbnail of how strongly each layer (row) reads each earlier output (column); "" if a mechanism has none."""

    def weight(layer: int, source: int) -> float:
        if residual in ("plain", "prenorm"):
            return 0.45
        if residual == "full_attnres":
            skip = 0.5 if (layer, source) in ((5, 2), (8, 4)) else 0.0
            return 0.1 + 0.85 * math.exp(-(layer - source) / 0.9) + skip + (0.4 if source == 0 and layer else 0)
        behind = (layer + 2) // 3 - (source + 2) // 3
        return 0.1 + 0.75 * math.exp(-behind / 0.8) + (0.3 if source == 0 and layer else 0)

    if residual not in ("plain", "prenorm", "full_attnres", "block_attnres"):
        return ""
    cells = "".join(
        f'<rect x="{source}" y="{layer}" width=".88" height=".88" fill-opacity="{min(1, weight(layer, source)):.2f}"/>'
        for layer in range(9)
        for source in range(layer + 1)
    )
    return f'<svg viewBox="0 0 9 9" style="fill: var(--m{index})" aria-hidden="true">{cells}</svg>'
