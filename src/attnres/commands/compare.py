"""attnres compare"""

from __future__ import annotations

import inspect
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import residual as residuals
from ..errors import UsageError
from ..lab.compare import CompareConfig, compare
from ..model import DecoderShape, preset
from . import flags
from .lab_flags import SeededFlags, names_of, seeds_of

ResidualFlags: Any = flags.residual_flags(with_name=False)


@dataclass
class CompareFlags(SeededFlags):
    """Train residual connections side by side, from equal weights on equal data, and report on them.

    Writes results.json, figures/ and report.html under --out. Called again after an interruption it continues.
    """

    residuals: str = "prenorm,block_attnres,full_attnres"
    """Residual connections, separated by commas; the first is the baseline."""
    preset: flags.PresetName = None
    model: DecoderShape = field(default_factory=DecoderShape)
    """Shape of the models."""
    residual: ResidualFlags = field(default_factory=ResidualFlags)
    """Options for every residual connection that has them."""


def run(argv: Sequence[str]) -> int:
    file = flags.peek(argv, "config")["config"]
    shape = flags.peek([*flags.of_file(file, CompareFlags), *argv], "preset")["preset"] or "tiny"
    default = CompareFlags(model=flags.open_shape(preset(shape)), out=Path("runs/compare"))
    given = flags.parse(CompareFlags, argv, "compare", default, file)
    names = names_of(given.residuals)
    config = CompareConfig(
        residuals=names,
        seeds=seeds_of(given.seeds),
        train=flags.train_config(given, given.model, names[0], {}),
        residual_options={
            name: flags.options_for(name, options, given.preset)
            for name, options in options_of(names, flags.chosen_options(given.residual)).items()
        },
    )
    results = compare(config, command=shlex.join(["attnres", "compare", *argv]))
    print(table(results))
    print(f"\nreport: {given.out / 'report.html'}", file=sys.stderr)
    return 0


def table(results: dict[str, Any]) -> str:
    """The summary of a comparison, in plain columns."""
    heads = ["residual", "parameters", "tokens", "val loss", "difference", "tokens/s", "peak memory"]
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
                f"{row['throughput_ratio']:.2f}x",
                f"{row['peak_memory_bytes'] / 2**20:,.0f} MiB",
            ]
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(heads))]
    lines = [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    lines.insert(1, "-" * len(lines[0]))
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
