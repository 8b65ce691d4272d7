"""Calls in child processes: what takes too long or crashes there is ended, and costs nothing else its time.

A signal cannot do that: while a compiler or a driver runs in this process, no handler of Python's does.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, NamedTuple

import timing
import torch

SECONDS_TO_START = 120  # torch is imported meanwhile


class Failed(Exception):
    """A call raised; the message is its error in one line."""


class Ended(Failed):
    """A call did not answer in time, or its process ended."""


class Worker:
    """A child process that makes one call after another. A call that overruns ends the process and whatever it has
    started; the next call begins in a new one."""

    def __init__(self) -> None:
        self.process: Any = None
        self.connection: Any = None

    def call(self, function: Callable[..., Any], *args: Any, seconds: float) -> Any:
        """What function(*args) returns there. Raises Failed if it raises, Ended after `seconds`; starting the process
        is not counted."""
        if self.process is None or not self.process.is_alive():
            self._start()
        try:
            self.connection.send((function, args))
            answered = self.connection.poll(max(0.0, seconds))
        except BaseException:
            self.stop()
            raise
        if not answered:
            self.stop()
            raise Ended(f"not ready within {seconds:.0f} s")
        try:
            error, value = self.connection.recv()
        except (EOFError, ConnectionResetError) as reason:
            self.process.join(10)
            code = self.process.exitcode
            self.stop()
            raise Ended(f"its process ended with exit code {code}") from reason
        if error is not None:
            if "CUDA error" in error or "AcceleratorError" in error:  # every later call there would fail alike
                self.stop()
            raise Failed(error)
        return value

    def too_long(self, function: Callable[..., Any], *args: Any, seconds: float) -> str | None:
        """Why function(*args) must not be called in this process: it overran there or took the process down. None if
        it returned, or raised, as it then will here."""
        try:
            self.call(function, *args, seconds=seconds)
        except Ended as reason:
            return str(reason)
        except Failed:
            pass
        return None

    def kill(self) -> None:
        """Ends the process and what it has started; a call that waits for it in another thread raises Ended."""
        if self.process is None:
            return
        with suppress(ProcessLookupError):
            if os.getpgid(self.process.pid) == self.process.pid:
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()

    def stop(self) -> None:
        if self.process is None:
            return
        self.kill()
        self.process.join()
        self.connection.close()
        self.process = self.connection = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: Any) -> None:
        self.stop()

    def _start(self) -> None:
        self.stop()
        context = multiprocessing.get_context("forkserver")  # imports torch once for all
        context.set_forkserver_preload(["torch"])
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,))
        self.process.start()
        theirs.close()
        if not self.connection.poll(SECONDS_TO_START):
            self.stop()
            raise Ended(f"no process could be started within {SECONDS_TO_START} s")
        self.connection.recv()


def _serve(connection: Any) -> None:
    with suppress(OSError):
        os.setpgid(0, 0)  # so that what calls start ends with this process
    threading.Thread(target=_follow_parent, daemon=True).start()
    connection.send("ready")
    while True:
        try:
            function, args = connection.recv()
        except EOFError:
            return
        try:
            answer = None, function(*args)
        except Exception as error:
            answer = timing.one_line(error), None
        connection.send(answer)
        gc.collect()
        if torch.cuda.is_initialized():
            with suppress(Exception):
                torch.cuda.empty_cache()


def _follow_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.killpg(0, signal.SIGKILL) if os.getpgrp() == os.getpid() else os._exit(1)


class Answer(NamedTuple):
    """value: what a call returned; error: None, or in one line why there is none; seconds that it took."""

    name: str
    value: Any
    error: str | None
    seconds: float


def each(
    calls: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]], workers: int, seconds: float, until: float
) -> Iterator[Answer]:
    """Makes the calls, so many at a time, and yields the answers as they come.

    seconds: what one call may take; until: the time.monotonic() at which all ends. A call that this end meets, and
    those that have not begun, have no answer.
    """
    waiting, answers = list(calls.items()), queue.SimpleQueue[Answer | None]()
    started: list[Worker] = []

    def serve() -> None:
        with Worker() as worker:
            started.append(worker)
            while waiting:
                try:
                    name, (function, args) = waiting.pop(0)
                except IndexError:
                    break
                began = time.monotonic()
                allowed = min(seconds, until - began)
                if allowed <= 0:
                    break
                value, error = None, None
                try:
                    value = worker.call(function, *args, seconds=allowed)
                except Ended as reason:
                    if time.monotonic() >= until:
                        break
                    error = str(reason)
                except Failed as reason:
                    error = str(reason)
                answers.put(Answer(name, value, error, time.monotonic() - began))
        answers.put(None)

    workers = max(1, min(workers, len(waiting)))
    with ThreadPoolExecutor(workers) as pool:
        running = [pool.submit(serve) for _ in range(workers)]
        try:
            for _ in range(workers):
                while (answer := answers.get()) is not None:
                    yield answer
        finally:
            waiting.clear()
            for worker in started:
                worker.kill()
        for future in running:
            future.result()
