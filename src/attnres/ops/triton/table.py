"""Launch configurations of the Triton kernels, as measured.

A line says what a kernel takes for rows up to a padded width. All lines give the same results; they differ in speed.

Measured on an H100 (torch 2.11, Triton 3.6) with `benchmarks/tune.py`; other devices take the same lines until somebody
has measured them. ATTNRES_LAUNCH names a JSON file, as tune.py writes it, whose lines replace these.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from ... import json_text
from ...errors import UsageError


class Line(NamedTuple):
    """warps a program; tile: most sources held in registers together, longer lists go in tiles of four (phase 1 holds
    all in its backward pass); programs a multiprocessor; stages: 2 fetches the next token ahead."""

    warps: int
    tile: int = 1
    programs: int = 1
    stages: int = 1


TABLE: dict[str, dict[int, Line]] = {
    "read_forward": {512: Line(1, 4), 1024: Line(2, 4), 2048: Line(4, 4), 4096: Line(8, 4), 8192: Line(4, 2)},
    "read_backward": {
        512: Line(2, 12, 8, 2),
        1024: Line(4, 12, 4, 2),
        2048: Line(8, 12, 2, 2),
        4096: Line(16, 5, 1, 2),
        8192: Line(8, 1),
    },
    "merge_forward": {512: Line(1), 1024: Line(2), 2048: Line(4), 4096: Line(8), 8192: Line(16)},
    "merge_backward": {
        512: Line(1, programs=12),
        1024: Line(4, programs=6),
        2048: Line(8, programs=3, stages=2),
        4096: Line(8, programs=2, stages=2),
        8192: Line(16, programs=1, stages=2),
    },
    "add_norm_forward": {512: Line(1), 1024: Line(2), 2048: Line(4), 4096: Line(8), 8192: Line(16)},
    "add_norm_backward": {
        512: Line(2, programs=16),
        1024: Line(4, programs=6, stages=2),
        2048: Line(4, programs=4, stages=2),
        4096: Line(8, programs=2, stages=2),
        8192: Line(16, programs=1, stages=2),
    },
    "inter_block_forward": {
        512: Line(1, 12),
        1024: Line(2, 12),
        2048: Line(4, 12),
        4096: Line(8, 8),
        8192: Line(16, 4),
    },
    "inter_block_backward": {
        512: Line(2, programs=4, stages=2),
        1024: Line(4, programs=2, stages=2),
        2048: Line(8, programs=1, stages=2),
        4096: Line(16, programs=1, stages=2),
        8192: Line(16),
    },
}

FEW_TOKENS = 128
"""Up to here, as in decoding, tokens cannot fill a device."""

_overrides: dict[str, Line] = {}


def line(kernel: str, width: int) -> Line:
    """What `kernel` takes for rows of `width`."""
    if kernel in _overrides:
        return _overrides[kernel]
    lines = TABLE[kernel]
    for most, chosen in lines.items():  # in ascending order
        if width <= most:
            return chosen
    return lines[max(lines)]


def launch_table() -> dict[str, dict[int, Line]]:
    """A copy of the table in force, by kernel and padded width."""
    return {kernel: dict(widths) for kernel, widths in TABLE.items()}


@contextmanager
def override(kernel: str, **values: int) -> Iterator[None]:
    """Within it `kernel` takes a line with these values, whatever the width: for sweeps."""
    if kernel not in TABLE:
        raise UsageError(f"kernel must be one of {', '.join(TABLE)}; it is {kernel!r}")
    before = _overrides.get(kernel)
    _overrides[kernel] = Line(**values)
    try:
        yield
    finally:
        if before is None:
            del _overrides[kernel]
        else:
            _overrides[kernel] = before


def _load(file: Path) -> None:
    try:
        loaded = {
            kernel: {int(width): Line(**values) for width, values in widths.items()}
            for kernel, widths in json_text.parse_object(file.read_bytes())["table"].items()
        }
        if unknown := sorted(set(loaded) - set(TABLE)):
            raise KeyError(", ".join(unknown))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UsageError(
            f"ATTNRES_LAUNCH must name a file that benchmarks/tune.py wrote; {file} cannot be used: {error!r}"
        ) from error
    for kernel, widths in loaded.items():
        TABLE[kernel] = dict(sorted((TABLE[kernel] | widths).items()))


if os.environ.get("ATTNRES_LAUNCH"):
    _load(Path(os.environ["ATTNRES_LAUNCH"]))
