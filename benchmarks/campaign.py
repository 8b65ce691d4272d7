"""Everything that this project wants to know of a GPU, in a few calls of some minutes: `campaign.sh` starts it.

    bash benchmarks/campaign.sh --out DIR --minutes 9            # then again with --resume until nothing is left
    bash benchmarks/campaign.sh --out DIR --quick                # tiny shapes, to see that it works; a CPU will do

Stages come in the order of what their answers are worth; each question is asked in a child process with a deadline of
its own. What does not fit the minutes is left for the next call.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import campaign_jobs as jobs
import campaign_page
import campaign_run
import processes
import timing
import training
import turns
from campaign_jobs import Spec
from decoders import Row, shape
from processes import Answer

SECONDS_TO_SAVE = 5
WIDTHS = (2048, 1024, 512)
OTHER_WIDTHS = (7168, 768, 2304, 4096)
TOKENS = {512: 65536, 768: 65536, 1024: 32768, 2048: 16384, 2304: 16384, 4096: 8192, 7168: 8192}
PATHS = {512: (24, 3), 768: (24, 3), 1024: (48, 6), 2048: (32, 8), 2304: (54, 6), 4096: (64, 8), 7168: (186, 24)}
PUBLISHED = ((2, 1), (5, 128), (5, 1024), (9, 128), (9, 8192))
DTYPES = ("bfloat16", "float16", "float32")
CPUS = max(1, (os.cpu_count() or 1) - 1)


@dataclass(frozen=True)
class Stage:
    """Questions by name, and how they are put: run(names, until) yields answers. It begins only with so many seconds
    left."""

    name: str
    names: list[str]
    run: Callable[[list[str], float], Iterator[Answer]]
    least: float = 15.0


def asked(
    name: str,
    calls: dict[str, Any],
    seconds: float,
    workers: int = 1,
    warm: dict[str, Any] | None = None,
    to_warm: float = 90.0,
) -> Stage:
    """Calls in worker processes. warm: calls that compile the same kernels side by side first, in to_warm seconds each.
    What does not get ready then is not tried again."""

    def run(names: list[str], until: float) -> Iterator[Answer]:
        ended = set()
        before = {key: call for key, call in (warm or {}).items() if key in names}
        for answer in processes.each(before, CPUS, to_warm, until):
            if answer.error and answer.error.startswith("not ready"):
                ended.add(answer.name)
                yield answer
        left = {key: calls[key] for key in names if key not in ended}
        yield from processes.each(left, workers, seconds, until)

    return Stage(name, list(calls), run)


def timed(name: str, function: Callable[..., Any], specs: list[Spec]) -> Stage:
    calls = {spec.name: (_function(spec, function), (spec,)) for spec in specs}
    warm = {spec.name: (_function(spec, function), (spec.warm(),)) for spec in specs}
    return asked(name, calls, 90, warm=warm)


def _function(spec: Spec, function: Callable[..., Any]) -> Callable[..., Any]:
    return jobs.time_path if spec.op.startswith("path") else function


def trained(name: str, groups: dict[str, turns.Group], seconds: float, least: float) -> Stage:
    def run(names: list[str], until: float) -> Iterator[Answer]:
        yield from turns.measure({key: groups[key] for key in names}, seconds, until)

    return Stage(name, list(groups), run, least)


def checks(widths: tuple[int, ...], quick: bool) -> dict[str, Any]:
    """Every op in every dtype, on numbers of tokens that fill no tile, few and many."""
    sizes = [("read", 2, 0), ("read", 9, 0), ("read", 25, 0), ("read, no norm", 5, 0)]
    sizes += [("read, prior", 3, 0), ("read, prior", 25, 0)]
    sizes += [("phase 1", 2, 3), ("phase 1", 8, 8), ("phase 1", 8, 24)]
    sizes += [("phase 1, norm", 1, 4), ("phase 1, norm", 8, 3), ("phase 1, norm", 25, 4), ("phase 1, norm", 8, 8)]
    sizes += [("phase 2", 0, 0), ("phase 2, first", 0, 0), ("add + norm", 0, 0), ("norm", 0, 0)]
    if quick:
        sizes = [("read", 3, 0), ("read, prior", 2, 0), ("phase 1", 2, 3), ("phase 1, norm", 2, 3), *sizes[-4:]]
    specs = [
        Spec(op, width, tokens, n, S, dtype=dtype)
        for width in widths
        for dtype in (DTYPES[1:] if quick else DTYPES if width in (512, 2048, 7168) else DTYPES[:1])
        for op, n, S in sizes
        for tokens in ((5,) if quick else (3, 515))
    ]
    return {f"{spec.name} {spec.dtype}": (jobs.check, (spec,)) for spec in specs}


def ops_of(width: int) -> list[Spec]:
    tokens, (L, S) = TOKENS[width], PATHS[width]
    path_tokens = tokens if width < 7168 else 2048  # of 186 layers
    specs = [Spec("path, Block", width, path_tokens, L=L, S=S)]
    specs += [Spec("read", width, tokens, n=n) for n in (9, 2, 5, 25)]
    specs += [Spec("phase 1", width, tokens, n=n, S=S) for n, S in ((4, 8), (8, 24), (8, 3), (8, 8))]
    specs += [Spec("phase 1, norm", width, tokens, n=n, S=4) for n in (5, 29)]
    specs += [Spec("read, prior", width, tokens, n=3)]
    specs += [Spec("phase 2", width, tokens), Spec("add + norm", width, tokens)]
    return [*specs, *([Spec("path, Full", width, tokens, L=L)] if width in WIDTHS else [])]


def groups(mode: str) -> dict[str, turns.Group]:
    shapes = {
        2048: shape("d=2048, 16 blocks", 2048, 16, 128, sequences=8, context=2048),
        1024: shape("d=1024, 24 blocks", 1024, 24, 128, sequences=8, context=2048),
        512: shape("d=512, 12 blocks", 512, 12, 64, sequences=64, context=1024),
    }
    rows = tuple(
        replace(row, compiled=mode == "compiled", checkpointed=mode == "checkpointed") for row in training.OURS
    )
    return {f"{s.name}, {s.tokens} tokens": turns.Group(s, rows) for s in shapes.values()}


def stages(scratch: Path, quick: bool) -> list[Stage]:
    """The most important first."""
    if quick:
        return quick_stages(scratch)
    cards = [Spec("read, no norm", 7168, tokens, n=n) for n, tokens in PUBLISHED]
    wide = next(iter(groups("eager").values())).shape
    peers = (Row("prenorm"), Row("block_attnres"), *(Row("block_attnres", name) for name in jobs.RIVALS))
    versus, small = (
        {
            f"{rival}: {case}": (jobs.against, (rival, case, tokens, False))
            for rival, of in jobs.RIVALS.items()
            for case in of
        }
        for tokens in (16384, 512)
    )
    versus |= {f"fla Triton: {s.name}": (jobs.published, (s, "fla Triton")) for s in cards}
    return [
        asked("correctness", checks(tuple(TOKENS), quick), 90, workers=CPUS),
        timed("ops", jobs.time_op, [spec for width in WIDTHS for spec in ops_of(width)]),
        trained("training, compiled", groups("compiled"), 300, least=330),
        trained("training, eager", groups("eager"), 120, least=100),
        asked("decode", {f"batch {b}": (jobs.decode, (b, False)) for b in (1, 64)}, 90),
        timed("published shapes", jobs.published, cards),
        trained("training, checkpointed", groups("checkpointed"), 120, least=100),
        timed("ops, other widths", jobs.time_op, [spec for width in OTHER_WIDTHS for spec in ops_of(width)]),
        asked("rivals", versus, 75, warm=small, to_warm=150),
        trained("rivals in training", {f"{wide.name}, {wide.tokens} tokens": turns.Group(wide, peers)}, 120, least=150),
        run_stage(scratch, quick),
    ]


def quick_stages(scratch: Path) -> list[Stage]:
    ops = [Spec("path, Block", 32, 8, L=4, S=2, repeats=2), Spec("path, Full", 32, 8, L=4, repeats=2)]
    ops += [Spec("read", 32, 8, n=3, repeats=2), Spec("phase 1", 32, 8, n=2, S=3, repeats=2)]
    ops += [Spec("phase 2", 32, 8, repeats=2), Spec("add + norm", 32, 8, repeats=2)]
    tiny = shape("d=32, 2 blocks", 32, 2, 16, sequences=2, context=16)
    versus = {f"{rival}: read": (jobs.against, (rival, "read", 8, True)) for rival in jobs.RIVALS}
    return [
        asked("correctness", checks((32,), quick=True), 90, workers=CPUS),
        timed("ops", jobs.time_op, ops),
        trained("training, eager", {"d=32": turns.Group(tiny, tuple(training.OURS), 2)}, 90, least=15),
        asked("decode", {"batch 1": (jobs.decode, (1, True))}, 90),
        timed("published shapes", jobs.published, [Spec("read, no norm", 32, 8, n=3, repeats=2)]),
        asked("rivals", versus, 90),
        run_stage(scratch, quick=True),
    ]


def run_stage(scratch: Path, quick: bool) -> Stage:
    def run(names: list[str], until: float) -> Iterator[Answer]:
        yield from campaign_run.train(names, scratch, quick, until)

    return Stage("run", list(campaign_run.NAMES[:2] if quick else campaign_run.NAMES), run, least=90)


class Results:
    """What was found so far, saved after every answer."""

    def __init__(self, out: Path, resume: bool) -> None:
        self.out = out
        file = out / "results.json"
        if file.exists() and not resume:
            sys.exit(f"{file} has results of an earlier call; add --resume to go on, or choose another --out")
        self.document = json.loads(file.read_text()) if file.exists() else {"calls": [], "results": {}}

    def todo(self, stage: Stage) -> list[str]:
        found = self.document["results"].get(stage.name, {})
        return [n for n in stage.names if n not in found or found[n].get("value", {}).get("unfinished")]

    def add(self, stage: Stage, answer: Answer) -> None:
        entry = {"call": len(self.document["calls"]) - 1, "seconds": round(answer.seconds, 1)}
        entry |= {"value": answer.value} if answer.error is None else {"failed": answer.error}
        self.document["results"].setdefault(stage.name, {})[answer.name] = entry
        self.save()

    def save(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        timing.write(self.out / "results.json", json.dumps(self.document, indent=1))
        timing.write(self.out / "summary.md", "\n".join(campaign_page.lines(self.document)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of summary.md and results.json")
    parser.add_argument("--minutes", type=float, default=9.0, help="what this call may take")
    parser.add_argument("--resume", action="store_true", help="skip what earlier calls with this --out have found")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, nothing compiled by torch.compile")
    parser.add_argument("--only", nargs="+", metavar="STAGE", help="stages by a part of their names")
    parser.add_argument(
        "--scratch", type=Path, default=Path(tempfile.gettempdir()) / "attnres-campaign", help="of runs"
    )
    arguments = parser.parse_args()
    until = time.monotonic() + 60 * arguments.minutes - SECONDS_TO_SAVE
    results = Results(arguments.out, arguments.resume)
    with processes.Worker() as worker:
        facts = worker.call(jobs.describe, arguments.quick, seconds=max(0.0, until - time.monotonic()))
    results.document["calls"].append(facts)
    chosen = stages(arguments.scratch, arguments.quick)
    for stage in chosen:
        if arguments.only and not any(word in stage.name for word in arguments.only):
            continue
        todo = results.todo(stage)
        if not todo or until - time.monotonic() < stage.least:
            continue
        began = time.monotonic()
        for answer in stage.run(todo, until):
            results.add(stage, answer)
        left = len(results.todo(stage))
        print(f"{stage.name}: {time.monotonic() - began:.0f} s, {len(todo) - left} answered, {left} left", flush=True)
    results.document["left"] = {stage.name: names for stage in chosen if (names := results.todo(stage))}
    results.save()
    print("\n".join(campaign_page.lines(results.document)[:60]))


if __name__ == "__main__":
    main()
