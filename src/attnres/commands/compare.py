"""attnres compare"""

from __future__ import annotations

import inspect
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import residual as residuals
from ..analysis.measure.worth import in_words
from ..errors import UsageError
from ..lab.compare import CompareConfig, compare
from ..text_table import columns
from . import flags


@dataclass
class CompareFlags(flags.LabFlags, flags.PresetFlags):
    """Train residual connections side by side, from equal weights on equal data, and report on them.

    Writes results.json, figures/ and report.html under --out. Called again after an interruption it continues.
    """


def run(argv: Sequence[str]) -> int:
    without = (*flags.SET_BY_LAB, "jobs", "minutes")
    given = flags.parse("compare", argv, CompareConfig, CompareFlags, start=_start, without=without)
    results = compare(comparison(given), command=shlex.join(["attnres", "compare", *argv]))
    print(table(results))
    print(f"\nreport: {given['out'] / 'report.html'}", file=sys.stderr)
    return 0


def _start(given: flags.Values) -> flags.Values:
    return {"out": Path("runs/compare"), **flags.of_preset(given)}


def comparison(given: flags.Given) -> CompareConfig:
    """The comparison that the flags describe."""
    entries = given["residuals"] or CompareConfig.residuals  # an empty list is refused below
    names = list(dict.fromkeys(residuals.named(entry)[0] for entry in entries))
    options = options_of(names, given.residual_options())
    return given.make(
        CompareConfig,
        train=given.train(names[0], {}),
        residual_options={name: given.options_for(name, chosen) for name, chosen in options.items()},
    )


def table(results: dict[str, Any]) -> str:
    """The summary of a comparison, in plain columns."""
    times = (results.get("longer_baseline") or {}).get("times")
    heads = ["residual", "parameters", "tokens", "val loss", "difference", *["worth"] * bool(times)]
    heads += ["tokens/s", "peak memory"]
    rows = [heads]
    for row in results["summary"]:
        spread, difference = row["val_loss_spread"], row["difference_spread"]
        rows.append(
            [
                row["residual"],
                f"{row['parameters']:,}",
                f"{row['tokens']:,}",
                f"{row['val_loss']:.4f}" + ("" if spread is None else f" (spread {spread:.4f})"),
                f"{row['difference']:+.4f}" + ("" if difference is None else f" (spread {difference:.4f})"),
                *([f"{in_words(row['worth'], times)}x"] if times else []),
                f"{row['throughput_ratio']:.2f}x",
                f"{row['peak_memory_bytes'] / 2**20:,.0f} MiB",
            ]
        )
    lines = columns(rows, left=1)
    lines.insert(1, "-" * len(lines[0]))
    if times:
        base = results["baseline"]
        lines.append(
            f"\nworth: how many times its tokens {base} needs for that loss, by a run on {times:g} times as many"
        )
    if len(results["summary"][0]["seeds"]) == 1:
        lines.append("\none seed: a difference of a few hundredths may be chance; --seeds 0,1,2 shows the spread")
    return "\n".join(lines)


def options_of(names: Sequence[str], chosen: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Gives each option to the mechanisms that take it."""
    taken = {name: set(inspect.signature(residuals.get(name).__init__).parameters) for name in names}
    for option in chosen:
        if not any(option in options for options in taken.values()):
            raise UsageError(f"--residual.{option.replace('_', '-')} is an option of none of {', '.join(names)}")
    return {name: {o: v for o, v in chosen.items() if o in options} for name, options in taken.items()}
