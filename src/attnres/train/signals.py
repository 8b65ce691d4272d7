"""Stopping a run from outside: what SIGTERM, SIGHUP and Ctrl-C do to it, and to the processes that it starts."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that gets the signal's number when one of STOPS arrives; a second Ctrl-C ends the process at once."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # Python delivers signals to the main thread only
        yield received
        return

    def note(number: int, frame: Any) -> None:
        received.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {number: signal.signal(number, note) for number in STOPS if not outlives_terminal(number)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def outlives_terminal(number: int) -> bool:
    """Whether this is SIGHUP and whoever started the process has it ignored, as nohup does: then it stays ignored."""
    return number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN


@contextmanager
def signals_blocked(*signals: int) -> Iterator[None]:
    """Processes started within never get `signals`; Ctrl-C, for one, goes to every process of the terminal.

    This process gets what arrives meanwhile afterwards.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
