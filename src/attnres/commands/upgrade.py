"""attnres upgrade"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..text_table import columns
from ..upgrade import UpgradeConfig, upgrade
from . import flags
from .fields import POSITIONAL


@dataclass(kw_only=True)
class UpgradeFlags(flags.FileFlags):
    """Convert a pretrained model to Attention Residuals, train it and the model as it was alike, and say whether it
    helped. Called again after an interruption it continues.
    """

    model: str = field(metadata=POSITIONAL)
    """Folder of a transformers model, a GGUF file (whose weights are dequantised) or a name on the Hub."""


def run(argv: Sequence[str]) -> int:
    given = flags.parse("upgrade", argv, UpgradeConfig, UpgradeFlags)
    results = upgrade(config := given.make(UpgradeConfig), command=shlex.join(["attnres", "upgrade", *argv]))
    print(table(results))
    print(f"\n{results['finding']}")
    print(f"model: {config.out / 'upgraded'}\nreport: {config.out / 'report.html'}", file=sys.stderr)
    return 0


def table(results: dict[str, Any]) -> str:
    """The summary of an upgrade, in plain columns."""
    rows = [["arm", "trained", "tokens", "before", "after", "difference", "plain, equal time", "tokens/s", "memory"]]
    for row in results["summary"]:
        is_plain, at_equal_time, ratio = row["verdict"] is None, row["plain_at_equal_time"], row["throughput_ratio"]
        rows.append(
            [
                row["residual"],
                f"{row['trained_parameters']:,}",
                f"{row['tokens']:,}",
                f"{row['first_loss']:.4f}",
                f"{row['val_loss']:.4f}",
                "" if is_plain else f"{row['difference']:+.4f} +- {row['standard_error']:.4f}",
                "-" if at_equal_time is None else f"{at_equal_time:.4f}",
                "-" if ratio is None else f"{ratio:.2f}x",
                f"{row['peak_memory_bytes'] / 2**20:,.0f} MiB",
            ]
        )
    lines = columns(rows, left=1)
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
