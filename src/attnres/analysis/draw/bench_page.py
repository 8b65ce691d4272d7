"""The page of `attnres bench`: a bar for every call, its range over the rounds, and the machine."""

from __future__ import annotations

from html import escape
from typing import Any

from .page import document


def page(found: dict[str, Any], sentence: str) -> str:
    """A self-contained HTML page.

    Args:
        found: what `attnres.bench.bench` returns, with the command that asked for it.
        sentence: what it comes to.
    """
    sections = [_section(name, rows) for name, rows in found["tables"].items()]
    facts = {
        "Device": found["device"],
        "Dtype": found["dtype"],
        "Shape": f"width {found['width']}, {found['layers']} Transformer blocks, {found['tokens']:,} tokens",
        "Copy": f"{found['copy_gbs']:.1f} GB/s read and written",
        "Versions": f"attnres {found['version']}, torch {found['torch']}, Python {found['python']}",
        "Command": found.get("command"),
        "Date": found["date"],
    }
    listed = "".join(f"<dt>{name}</dt><dd>{escape(str(value))}</dd>" for name, value in facts.items() if value)
    left_out = "".join(f"<li>{escape(what)}: {escape(why)}</li>" for what, why in found["left_out"].items())
    body = (
        f'<main><header><h1>What depth attention costs here</h1><p class="lede">{escape(sentence)}</p></header>'
        f"{''.join(sections)}"
        f"{f'<section><h2>Left out</h2><ul>{left_out}</ul></section>' if left_out else ''}"
        f'<footer><dl class="facts">{listed}</dl></footer></main>'
    )
    return document("bench", "What depth attention costs here", body)


def _section(name: str, rows: dict[str, Any]) -> str:
    most = max(row["milliseconds"]["max"] for row in rows.values())
    first = next(iter(rows))
    bars = "".join(_bar(title, row, most, title == first) for title, row in rows.items())
    title = escape(name[0].upper() + name[1:])
    note = (
        f"Milliseconds; in brackets to {escape(first)} in the same round. The thin line is the range over the rounds."
    )
    return f'<section><h2>{title}</h2><div class="bars">{bars}</div><p class="note">{note}</p></section>'


def _bar(title: str, row: dict[str, Any], most: float, base: bool) -> str:
    own, ratio = row["milliseconds"], row["ratio"]
    told = f"{own['median']:,.{0 if own['median'] >= 100 else 2}f} ms"
    told += "" if base else f" ({ratio['median']:.2f}, {ratio['min']:.2f} to {ratio['max']:.2f})"
    place = {key: 100 * own[key] / most for key in ("median", "min", "max")}
    return (
        f'<div class="row"><span class="name">{escape(title)}</span>'
        f'<span class="track" role="img" aria-label="{escape(title)}: {told}">'
        f'<span class="bar{" base" if base else ""}" style="width: {place["median"]:.2f}%"></span>'
        f'<span class="range" style="left: {place["min"]:.2f}%; width: {place["max"] - place["min"]:.2f}%"></span>'
        f'</span><span class="told number">{told}</span></div>'
    )
