"""Measures the launch configurations of the Triton kernels again, on any GPU, in minutes.

    PYTHONPATH=src python benchmarks/tune.py --out launch.json      # then: ATTNRES_LAUNCH=launch.json python ...

Candidates compile side by side in child processes; then each is checked against the result of the line in force and
timed alone. A line is replaced by one that is at least 2 % faster. The file is written after every kernel and width, so
that a sweep that is cut short keeps what it has. All lines give the same results; they differ in speed alone.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

import campaign_jobs as jobs
import processes
import timing
import torch
from campaign_jobs import Spec

from attnres.ops.triton.table import launch_table, override

GAIN = 0.98  # of the present time: what a new line must beat, above the noise of a median
VALUES = {"warps": (1, 2, 4, 8, 16), "tile": (2, 4, 8, 10, 12), "programs": (1, 2, 4, 8, 16), "stages": (1, 2)}
MOST_ELEMENTS = 128  # of a row that a thread holds: beyond, everything spills
WIDTHS = {512: 512, 1024: 1024, 2048: 2048, 4096: 4096, 8192: 7168}  # a padded width, and one that people use
TOKENS = {512: 65536, 1024: 32768, 2048: 16384, 4096: 8192, 8192: 8192}
OPS = {
    "read": Spec("read", 0, 0, n=9),
    "merge": Spec("phase 2", 0, 0),
    "add_norm": Spec("add + norm", 0, 0),
    "inter_block": Spec("phase 1, norm", 0, 0, n=8, S=4),  # more queries have a kernel without lines
}
Line = dict[str, int]


def spec_of(kernel: str, padded: int) -> Spec:
    return replace(OPS[kernel.rpartition("_")[0]], width=WIDTHS.get(padded, padded), tokens=TOKENS[padded])


def candidates(kernel: str, padded: int) -> list[Line]:
    """The line in force, then what else to try. A kernel uses those fields that its lines set."""
    lines = {width: line._asdict() for width, line in launch_table()[kernel].items()}
    present = lines[padded]
    free = [f for f in present if f == "warps" or len({1, *(line[f] for line in lines.values())}) > 1]
    found = [present]
    for values in itertools.product(*(VALUES[field] for field in free)):
        line = {**present, **dict(zip(free, values, strict=True))}
        per_thread = padded // (32 * line["warps"])
        if 2 <= per_thread <= MOST_ELEMENTS and line not in found:
            found.append(line)
    return found


def times(kernel: str, spec: Spec, lines: Sequence[Line]) -> list[float | None]:
    """Microseconds of each line, None for one that fails or gives something else than the first."""
    bench = jobs.open_bench("bfloat16" if torch.cuda.is_available() else "float32")
    shared, rows, call = jobs.inputs(bench, spec)
    leaves, part = [*shared, *rows], kernel.rpartition("_")[2]
    outputs = call(shared, rows)
    directions = jobs.directions_of(outputs)

    def run() -> Sequence[torch.Tensor]:
        if part == "forward":
            with torch.no_grad():
                return call(shared, rows)
        return torch.autograd.grad(outputs, leaves, directions, retain_graph=True)

    expected = [t.clone() for t in run()]
    result: list[float | None] = []
    for line in lines:
        watch = timing.Stopwatch(bench.device)
        try:
            with override(kernel, **line):
                error = timing.disagreement(run(), expected)
                measured = [watch(run)[1] for _ in range(spec.repeats + 2)][2:]
        except Exception:
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # raises where the device is lost: then the process is given up
            result.append(None)
        else:
            result.append(1e3 * median(measured) if error < jobs.TOLERANCE[bench.dtype] else None)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file, for ATTNRES_LAUNCH")
    parser.add_argument("--minutes", type=float, default=9.0, help="what is not reached keeps its line")
    parser.add_argument("--kernels", nargs="+", default=list(launch_table()), help="kernels by name")
    parser.add_argument("--widths", nargs="+", type=int, default=list(WIDTHS), help="padded widths")
    parser.add_argument("--quick", action="store_true", help="two candidates on few tokens: does the script work?")
    arguments = parser.parse_args()
    until = time.monotonic() + 60 * arguments.minutes
    asked = {
        (k, w): candidates(k, w)[: 2 if arguments.quick else None] for k in arguments.kernels for w in arguments.widths
    }
    specs = {(k, w): spec_of(k, w) for k, w in asked}
    if arguments.quick:
        specs = {
            key: replace(spec, tokens=4, n=min(spec.n, 3), S=min(spec.S, 2), repeats=1) for key, spec in specs.items()
        }
    with processes.Worker() as worker:
        document = worker.call(jobs.describe, arguments.quick, seconds=120)
    document |= {"table": {}, "microseconds": {}}

    def kernel_of(key: tuple[str, int], line: Line) -> str:
        return f"{key}: {line | {'programs': 0}}"  # how many programs run is no constant of a kernel

    compiled = {
        kernel_of(key, line): (times, (key[0], replace(specs[key], tokens=512, repeats=1), [line]))
        for key, lines in asked.items()
        for line in lines
        if not arguments.quick
    }
    workers = max(1, (os.cpu_count() or 1) - 1)
    half = time.monotonic() + 30 * arguments.minutes  # the other half is for timing
    late = {answer.name for answer in processes.each(compiled, workers, 60, half) if answer.error}
    print(f"{len(compiled)} configurations compiled, but for {len(late)}", flush=True)

    for key, lines in asked.items():
        asked[key] = [lines[0], *(line for line in lines[1:] if kernel_of(key, line) not in late)]
    calls = {
        f"{kernel}, {width}": (times, (kernel, specs[kernel, width], lines)) for (kernel, width), lines in asked.items()
    }
    for answer in processes.each(calls, 1, 120, until):
        kernel, _, width = answer.name.partition(", ")
        lines = asked[kernel, int(width)]
        found = [(us, i) for i, us in enumerate(answer.value or []) if us is not None]
        if not found:
            print(f"{answer.name}: {answer.error or 'no line works'}", flush=True)
            continue
        default = answer.value[0]
        best, i = min(found)
        kept = default is not None and best > GAIN * default
        us, line = (default, lines[0]) if kept else (best, lines[i])
        document["table"].setdefault(kernel, {})[width] = line
        document["microseconds"].setdefault(kernel, {})[width] = {"before": default, "now": us}
        timing.write(arguments.out, json.dumps(document, indent=1))
        print(f"{answer.name}: {default and round(default, 1)} -> {us:.1f} us  {line}", flush=True)


if __name__ == "__main__":
    main()
