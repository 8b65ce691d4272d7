"""attnres bench"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .. import files
from ..analysis.draw.bench_page import page
from ..bench import Machine, bench
from ..bench.words import sentence, table
from ..errors import Failure, UsageError
from . import flags


@dataclass
class BenchFlags(Machine):
    """Measure what depth attention costs here: a copy, a read, a training step and a decoded token, beside PreNorm.

    Needs no data. Calls take turns; times are medians, with their range over the rounds. A machine that does something
    else meanwhile gives wider ranges.
    """

    json: Path | None = None
    """File for everything that was measured."""
    page: Path | None = None
    """File for an HTML page with bars."""


def run(argv: Sequence[str]) -> int:
    given = flags.parse("bench", argv, BenchFlags).make(BenchFlags)
    for name in ("json", "page"):
        path = getattr(given, name)
        if path is not None and not path.parent.is_dir():
            raise UsageError(f"--{name} {path}: there is no folder {path.parent}; make it first")
    found = bench(given, lambda question: print(f"{question} ...", file=sys.stderr, flush=True))
    found["command"] = shlex.join(["attnres", "bench", *argv])
    print(f"{found['device']}, {found['dtype']}, width {found['width']}, torch {found['torch']}\n")
    print(f"{sentence(found)}\n\n{table(found)}")
    for path, text in ((given.json, json.dumps(found, indent=1) + "\n"), (given.page, page(found, sentence(found)))):
        if path is not None:
            try:
                files.write(path, text)
            except OSError as error:
                raise Failure(f"cannot write {path}: {error.strerror or error}") from error
    return 0
