"""What `attnres bench` has found, in a sentence and as a table."""

from __future__ import annotations

from typing import Any

from ..text_table import columns

LOOKED_AT = ("Block AttnRes", "Full AttnRes")
WIDE = 0.25
"""A range of ratios over which they say little."""


def sentence(found: dict[str, Any]) -> str:
    """What the user may expect, of training steps and decoded tokens."""
    kinds = {name.partition(",")[0]: rows for name, rows in found["tables"].items() if "compiled" not in name}
    told = []
    for title in LOOKED_AT:
        costs = [f"{cost(kinds[kind][title]['ratio'])} to a {kind}" for kind in ("training step", "decoded token")]
        told.append(f"{title} adds {' and '.join(costs)}")
    ratios = [kinds[kind][title]["ratio"] for kind in ("training step", "decoded token") for title in LOOKED_AT]
    wide = any(ratio["max"] - ratio["min"] > WIDE for ratio in ratios)
    doubt = " These ranges are wide, as where something else uses the machine; run it alone." if wide else ""
    return f"Here {'; '.join(told)}.{doubt}"


def cost(ratio: dict[str, float]) -> str:
    """Of a ratio to PreNorm what is beyond it, in percent, with the range over the rounds."""
    middle, least, most = (round(100 * (ratio[key] - 1)) for key in ("median", "min", "max"))
    return f"{middle} % ({least} to {most} %)"


def table(found: dict[str, Any]) -> str:
    """Every question, a line a call, in plain columns."""
    lines = [f"copy: {found['copy_gbs']:.1f} GB/s read and written", ""]
    for name, rows in found["tables"].items():
        first = next(iter(rows))
        heads = [name, "ms", "range", f"to {first}", "range"]
        cells = [[title, *_cells(row["milliseconds"], 2), *_cells(row["ratio"], 3)] for title, row in rows.items()]
        lines += [*columns([heads, *cells], left=1), ""]
    if "kernels" in found:
        others = list(found["kernels"][0]["published"])
        heads = ["sources x tokens", "us", "range", *(f"{other}, H100, published" for other in others)]
        cells = [
            [f"{row['sources']} x {row['tokens']}", *_cells(row["microseconds"], 2)]
            + [f"{row['published'][other]:g}" for other in others]
            for row in found["kernels"]
        ]
        lines += ["one read in bf16, D = 7168:", *columns([heads, *cells], left=1), ""]
    lines += [f"left out: {what}: {why}" for what, why in found["left_out"].items()]
    return "\n".join(lines).rstrip()


def _cells(values: dict[str, float], digits: int) -> list[str]:
    return [f"{values['median']:.{digits}f}", f"{values['min']:.{digits}f}-{values['max']:.{digits}f}"]
