"""Training steps of decoders that live in processes of their own and take turns on the device.

They compile side by side, one that takes too long is ended without harm to the others, and each has the device's
memory to itself while it steps. Rounds in which every decoder takes its turn meet drifts of the machine alike.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from statistics import median
from typing import Any

import timing
import torch
import training
from decoders import Nets, Row, Shape, observed
from processes import Answer, Ended, Failed, Worker

from attnres.bench import rivals
from attnres.run import hardware

SECONDS_TO_MEASURE = 40
TRIES = 40  # to find room on a device that others are using

_mine: list[Any] = []
"""In a child: its step and its device."""


@dataclass(frozen=True)
class Group:
    """Decoders whose steps are compared, prenorm first."""

    shape: Shape
    rows: tuple[Row, ...]
    rounds: int = 6


def prepare(shape: Shape, row: Row, threads: int) -> dict[str, Any]:
    """Builds and compiles a decoder, in a child. What a step takes at its fullest moment; a rival's error."""
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(threads))
    device = hardware.find_device("auto")
    dtype = hardware.find_precision("auto" if device.type == "cuda" else "float32", device)
    found, missing = rivals.load(device) if row.op != "attnres" else ({}, {})
    if row.op in missing:
        raise RuntimeError(missing[row.op])
    if row.compiled:
        with suppress(ImportError, AttributeError):  # else a step would hold its memory while its backward compiles
            from torch._functorch import config

            config.force_non_lazy_backward_lowering = True
    nets = Nets(shape, device, dtype, found)
    with timing.parallel_autotuning():
        step = nets.step(row)
        with_room(step, device)
        error = None
        if row.op != "attnres":
            error = timing.disagreement(observed(step), nets.expected(row.residual))
            if not error <= training.TOLERANCE[dtype]:
                raise RuntimeError(f"loss or gradients disagree: relative error {error:.2g}")
    peak = with_room(lambda: training.peak_memory(step, device), device)
    step.net.zero_grad(set_to_none=True)  # type: ignore[attr-defined]
    _mine[:] = [step, device]
    return {"peak_memory_bytes": peak, "error": error}


def with_room(call: Callable[[], Any], device: torch.device) -> Any:
    """call(), again while others fill the device's memory."""
    for _ in range(TRIES):
        with suppress(torch.OutOfMemoryError):
            return call()
        torch.cuda.empty_cache()
        time.sleep(1)
    return call()


def turn(steps: int) -> list[float]:
    """Milliseconds of so many steps after one that is not counted, in a child."""
    step, device = _mine
    step()
    times = [timing.wall(step, device) for _ in range(steps)]
    step.net.zero_grad(set_to_none=True)
    return times


def measure(groups: dict[str, Group], seconds: float, until: float) -> Iterator[Answer]:
    """The rows of every group, as `training.measure` gives them, and why others are not there.

    seconds: what preparing one decoder may take; all of all groups prepare side by side, and steps are timed when none
    does any more. Groups that are not ready shortly before `until` have no answer.
    """
    began = time.monotonic()
    last = until - SECONDS_TO_MEASURE
    keys = [(name, row) for name, group in groups.items() for row in group.rows]
    workers = {key: Worker() for key in keys}
    ready: dict[Any, dict[str, Any]] = {}
    left_out: dict[Any, str] = {}
    threads = max(2, (os.cpu_count() or 1) // max(1, len(keys)))

    def get_ready(key: tuple[str, Row]) -> None:
        allowed = min(seconds, last - time.monotonic())
        try:
            ready[key] = workers[key].call(prepare, groups[key[0]].shape, key[1], threads, seconds=allowed)
        except Ended as reason:
            if time.monotonic() < last:
                left_out[key] = str(reason)
        except Failed as reason:
            left_out[key] = str(reason)

    try:
        at_once = min(len(keys), max(1, (os.cpu_count() or 1) - 1))
        with ThreadPoolExecutor(at_once) as pool:
            list(pool.map(get_ready, keys))
        for name, group in groups.items():
            if any((name, row) not in ready and (name, row) not in left_out for row in group.rows):
                continue
            rows = [row for row in group.rows if (name, row) in ready]
            try:
                value = table(group, rows, {row: workers[name, row] for row in rows}, ready, name, until)
            except Ended:
                break
            value["left out"] = {str(row): left_out[name, row] for row in group.rows if (name, row) in left_out}
            yield Answer(name, value, None, time.monotonic() - began)
            for row in group.rows:
                workers[name, row].stop()
    finally:
        for worker in workers.values():
            worker.stop()


def table(
    group: Group, rows: Sequence[Row], workers: dict[Row, Worker], ready: dict[Any, Any], name: str, until: float
) -> dict[str, Any]:
    times: dict[Row, list[list[float]]] = {row: [] for row in rows}
    for _ in range(group.rounds):
        for row in rows:
            times[row].append(workers[row].call(turn, 2, seconds=max(0.0, until - time.monotonic())))
    result = []
    base = next((row for row in rows if row.residual == "prenorm"), None)
    for row in rows:
        ms = [m for round in times[row] for m in round]
        ratios = [median(a) / median(b) for a, b in zip(times[base], times[row], strict=True)] if base else []
        memory = ready[name, row]["peak_memory_bytes"]
        base_memory = base and ready[name, base]["peak_memory_bytes"]
        result.append(
            {
                "row": str(row),
                "residual": row.residual,
                "op": row.op,
                "mode": row.mode,
                "step_ms": timing.spread(ms),
                "tokens_per_second": group.shape.tokens / (1e-3 * median(ms)),
                "throughput_ratio": median(ratios) if ratios else None,
                "ratios": timing.spread(ratios) if ratios else None,
                "peak_memory_bytes": memory,
                "memory_ratio": memory / base_memory if memory and base_memory else None,
                "error": ready[name, row]["error"],
            }
        )
    return {"rows": result}
