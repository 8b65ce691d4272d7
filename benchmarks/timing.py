"""What the benchmarks share: the facts of a run, fair timing, a time budget, saved tables."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import attnres
from attnres.bench import clock
from attnres.run import hardware

RESULTS = Path(__file__).parent / "results"
wall, spread = clock.milliseconds, clock.spread
Times = dict[str, dict[str, list[float]]]
"""Milliseconds of every repeat, by variant and by part of it."""


def facts(device: torch.device, **more: Any) -> dict[str, Any]:
    """Where and with what a result was measured."""
    here = Path(__file__).parent
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True)
    return {
        "device": hardware.describe(device),
        "torch": torch.__version__,
        "triton": version("triton"),
        "python": platform.python_version(),
        "attnres": attnres.__version__,
        "commit": commit.stdout.strip() or None,
        "date": datetime.date.today().isoformat(),
        **more,
    }


def version(package: str) -> str | None:
    """Version of an installed distribution, None if it is not there."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


class Stopwatch:
    """Milliseconds that the device spends on a call, without the time that Python needs to launch it.

    On a GPU a spinning kernel goes ahead, long enough for every launch of the call to be queued behind it, so that the
    gaps between kernels are the device's own. The length comes from the first call. On a CPU it is `wall`.
    """

    SPIN_CYCLES_PER_MS = 2_000_000  # no GPU of today runs faster than 2 GHz for long
    LONGEST_SPIN_MS = 150.0

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.launch_ms: float | None = None

    def __call__(self, call: Callable[[], Any]) -> tuple[Any, float]:
        if self.device.type != "cuda":
            start = time.perf_counter()
            result = call()
            return result, 1e3 * (time.perf_counter() - start)
        torch.cuda.synchronize(self.device)
        start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if self.launch_ms is not None:
            torch.cuda._sleep(int(min(1.5 * self.launch_ms + 0.1, self.LONGEST_SPIN_MS) * self.SPIN_CYCLES_PER_MS))
        start = time.perf_counter()
        start_event.record()
        result = call()
        end_event.record()
        if self.launch_ms is None:
            self.launch_ms = 1e3 * (time.perf_counter() - start)
        torch.cuda.synchronize(self.device)
        return result, start_event.elapsed_time(end_event)


def compiled(function: Callable[..., Any], fullgraph: bool = True) -> Callable[..., Any]:
    """torch.compile for fixed shapes. Variants share code, and each is one more compilation of it."""
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(function, fullgraph=fullgraph, dynamic=False)


def interleave(variants: dict[str, Callable[[], dict[str, float]]], repeats: int, warmup: int = 2) -> Times:
    """Runs every variant once, then every variant again, so that drifts of the machine meet all of them alike.

    A variant returns its milliseconds by part. The first `warmup` rounds are not counted.
    """
    times: Times = {name: {} for name in variants}
    for repeat in range(repeats + warmup):
        for name, run in variants.items():
            parts = run()
            if repeat >= warmup:
                for part, milliseconds in parts.items():
                    times[name].setdefault(part, []).append(milliseconds)
    return times


def one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]


class OutOfTime(BaseException):
    """Not an Exception: code that retries on any error must not swallow it."""


class Budget:
    """Seconds that a whole benchmark may take; a part of it may be given less."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    def left(self) -> float:
        return self.end - time.monotonic()

    @contextmanager
    def limit(self, seconds: float) -> Iterator[None]:
        """Raises OutOfTime inside the block after that many seconds, or when the budget is spent.

        Backward passes run on this thread meanwhile: an exception cannot reach another one.
        """
        allowed = min(seconds, self.left())
        if allowed <= 0:
            raise OutOfTime("the time budget was spent")

        def ring(*_: Any) -> None:
            raise OutOfTime(f"not ready within {allowed:.0f} s (compiling and tuning)")

        before = signal.signal(signal.SIGALRM, ring)
        signal.setitimer(signal.ITIMER_REAL, allowed, 5.0)
        try:
            with torch.autograd.set_multithreading_enabled(False):
                yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0.0)
            signal.signal(signal.SIGALRM, before)


def attempt(prepare: Callable[[], None], budget: Budget, seconds: float, device: torch.device) -> str | None:
    """Runs `prepare` within its time. Returns None, or in one line why it failed; a failure leaves no memory behind."""
    try:
        with budget.limit(seconds):
            prepare()
        return None
    except OutOfTime as error:
        reason = str(error)
    except Exception as error:
        reason = one_line(error)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return reason


@contextmanager
def parallel_autotuning() -> Iterator[None]:
    """Lets Triton's autotuner compile the configurations that it is about to time side by side.

    What it times and chooses stays the same. Rivals tune up to 48 configurations a kernel, one after another a matter
    of minutes. Does nothing without Triton.
    """
    try:
        from triton.runtime import _async_compile
        from triton.runtime.autotuner import Autotuner
    except ImportError:
        yield
        return
    prune = Autotuner.prune_configs
    pool = ThreadPoolExecutor(os.cpu_count())

    def prune_and_compile(self: Any, kwargs: dict[str, Any]) -> list[Any]:
        configs = prune(self, kwargs)
        try:
            with _async_compile.AsyncCompileMode(pool, ignore_errors=True):
                for config in configs:
                    self.fn.run(**{**self.nargs, **kwargs, **config.all_kwargs(), "warmup": True})
        except Exception:
            pass  # then the autotuner compiles them itself, one by one
        finally:
            _async_compile.active_mode.set(None)
        return configs

    Autotuner.prune_configs = prune_and_compile
    try:
        yield
    finally:
        Autotuner.prune_configs = prune
        pool.shutdown(cancel_futures=True)


def disagreement(got: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """Largest relative error ||a - b|| / ||b|| over pairs of tensors; infinite where anything is not finite."""
    worst = 0.0
    for a, b in zip(got, expected, strict=True):
        a, b = a.detach().float(), b.detach().float()
        error = float(torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(b))
        worst = max(worst, error) if error < float("inf") else float("inf")
    return worst


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    return [
        "| " + " | ".join(header) + " |",
        "|" + "---|" * len(header),
        *("| " + " | ".join(map(str, row)) + " |" for row in rows),
        "",
    ]


def gaps(document: dict[str, Any]) -> list[str]:
    """What a finished run says about the parts that it has no numbers for."""
    lines = [f"Failed: {title}: {reason}" for title, reason in document["failed"].items()]
    if document["not reached"]:
        lines.append("Not reached in the time budget: " + "; ".join(document["not reached"]))
    return lines


def save(folder: Path, name: str, document: dict[str, Any], lines: Sequence[str]) -> None:
    """Writes NAME.json and NAME.md, each complete or not at all: a run may be cut short at any moment."""
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / f"{name}.json", json.dumps(document, indent=1))
    write(folder / f"{name}.md", "\n".join(lines).rstrip())


def write(file: Path, text: str) -> None:
    """A file, complete or not at all."""
    part = file.with_name(f"{file.name}.part")
    part.write_text(text + "\n")
    part.replace(file)
