"""Fair timing: calls take turns, so that whatever else the machine does meets all of them alike."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch

from ..run import hardware

LEAST, MOST = 3, 15
"""Rounds that are timed."""

Calls = dict[str, Callable[[], Any]]


class OutOfTime(BaseException):
    """Not an Exception: code that tries again on any error must not swallow it."""


def turns(calls: Calls, device: torch.device, seconds: float) -> dict[str, list[float]]:
    """Milliseconds of every call in rounds of one turn each, after a round that is not counted; as many rounds as fit
    into the seconds, at least LEAST, unless that takes twice as long, and at most MOST."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    end = time.monotonic() + seconds
    for call in calls.values():
        call()
    began = time.monotonic()
    for done in range(MOST):
        now = time.monotonic()
        if (done >= LEAST and now + (now - began) / done > end) or (done and now > end + seconds):
            break
        for name, call in calls.items():
            times[name].append(milliseconds(call, device))
    return times


def milliseconds(call: Callable[[], Any], device: torch.device) -> float:
    """What a user waits, from an idle device to an idle device."""
    hardware.synchronize(device)
    start = time.perf_counter()
    call()
    hardware.synchronize(device)
    return 1e3 * (time.perf_counter() - start)


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": median(values), "min": min(values), "max": max(values)}


def ratios(times: dict[str, list[float]], base: str) -> dict[str, dict[str, float]]:
    """Of every call its time to that of `base` in the same round: median, least and most."""
    return {name: spread([a / b for a, b in zip(own, times[base], strict=True)]) for name, own in times.items()}


@contextmanager
def limit(seconds: float) -> Iterator[None]:
    """Raises OutOfTime inside the block after so many seconds; where no signal can do that, the block runs on."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGALRM"):
        yield
        return

    def ring(*_: Any) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(0.001, seconds), 5.0)
    try:
        with torch.autograd.set_multithreading_enabled(False):  # an exception cannot reach another thread
            yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)
