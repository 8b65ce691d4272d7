"""The command line in real processes, which are cheap: each is forked from one server that has imported torch."""

import contextlib
import fcntl
import gc
import importlib
import io
import json
import os
import signal
import subprocess
import sys
import termios
import time
import traceback
from pathlib import Path
from typing import NamedTuple

import pytest

TIMING = ("tokens_per_second", "mfu")

# The process does something to itself when it is about to take a step, or in the middle of writing a checkpoint.
AT_STEP = """
import os, signal, time
from attnres.train.loop import Trainer
take_step = Trainer._train_step
def until_stopped():
    while signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        time.sleep(0.01)
def until_exists(path):
    while not os.path.exists(path):
        time.sleep(0.01)
def step(self, batches):
    if self.step + 1 == {step}:
        {action}
    return take_step(self, batches)
Trainer._train_step = step
"""
IN_SAVE = """
import os, signal, time
from attnres.run import checkpoint
sync, calls = checkpoint.sync, []
def half_way(path):
    calls.append(path)
    if len(calls) == {call}:
        {action}
    sync(path)
checkpoint.sync = half_way
"""


needs_full_device = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")


def kill(name):
    return f"os.kill(os.getpid(), signal.{name})"


def metrics(out: Path) -> list[dict]:
    """What the run in `out` recorded, but for its speed."""
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in record.items() if name not in TIMING} for record in records]


class Finished(NamedTuple):
    """status: the exit status, or minus the signal that ended the process."""

    status: int
    out: str
    err: str

    @property
    def said(self) -> str:
        """What a command that failed said beside its progress, which is one sentence."""
        (sentence,) = [line for line in self.err.splitlines() if not line.startswith(("INFO: ", "block_attnres"))]
        return sentence


class Process:
    """A command that runs; `pid` is also its process group."""

    def __init__(self, server: "Server", pid: int, logs: Path) -> None:
        self.server, self.pid, self.logs, self._status = server, pid, logs, None

    def err(self) -> str:
        return self.logs.with_suffix(".err").read_text()

    def status(self) -> int | None:
        """The exit status, None while it runs."""
        if self._status is None:
            self._status = self.server.ask(poll=self.pid)
        return self._status

    def wait_for(self, done, ended: bool = False, seconds: float = 120) -> None:
        """Returns once `done()` is true; fails if the process ends before, unless `ended`, or after `seconds`."""
        deadline = time.monotonic() + seconds
        while not done():
            if time.monotonic() > deadline:
                os.kill(self.pid, signal.SIGKILL)
                raise AssertionError(f"nothing happened for {seconds} s: {self.err()}")
            assert ended or self.status() is None, f"ended with {self.status()}: {self.err()}"
            time.sleep(0.02)

    def wait(self) -> Finished:
        self.wait_for(lambda: self.status() is not None, ended=True)
        return Finished(self.status(), self.logs.with_suffix(".out").read_text(), self.err())


class Server:
    """Starts commands. `patch` is Python code that the process runs first; `modules` are imported once for all."""

    def __init__(self, folder: Path, *modules: str) -> None:
        self.folder, self.count = folder, 0
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "ATTNRES_CACHE": str(folder / "cache"), "COLUMNS": "80"}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            [sys.executable, __file__, *modules], env=environment, cwd=folder, stdin=pipe, stdout=pipe, text=True
        )

    def ask(self, **request):
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def start(self, *argv: object, patch: str = "", terminal: str | None = None) -> Process:
        self.count += 1
        logs = self.folder / f"log{self.count}"
        for suffix in (".out", ".err"):
            logs.with_suffix(suffix).touch()
        pid = self.ask(argv=[str(a) for a in argv], patch=patch, logs=str(logs), terminal=terminal)
        return Process(self, pid, logs)

    def run(self, *argv: object, patch: str = "") -> Finished:
        return self.start(*argv, patch=patch).wait()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(10)


def _serve() -> dict:
    """Answers requests; returns one in the process that is to carry it out."""
    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        elif (answer := os.fork()) == 0:
            return request
        print(json.dumps(answer), flush=True)
    os._exit(0)  # as below


def _become(request: dict) -> None:
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for what runs in the background
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, suffix in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(request["terminal"] or f"{request['logs']}{suffix}", os.O_RDWR | os.O_APPEND), number)
    if request["terminal"]:
        fcntl.ioctl(1, termios.TIOCSCTTY, 0)  # so that its Ctrl-C comes here
    exec(request["patch"], {})


COMMANDS = ("attnres.commands.compare", "attnres.commands.train", "attnres.commands.generate")
LATE = ("torch._dynamo", "tensorboard.summary.writer.record_writer", "matplotlib.figure", "rich.progress")


def _warm_up() -> None:
    """Imports what commands need, some of it late, so that the processes find it in memory."""
    from attnres.run import hardware

    for name in (*COMMANDS, *LATE, *sys.argv[1:]):
        importlib.import_module(name)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        main(["train", "--help"])
    hardware.peak_flops = lambda device, precision: 1e11  # measuring takes as long as a tiny run
    gc.disable()  # nor do they live long enough to need it


if __name__ == "__main__":
    from attnres.cli import main

    _warm_up()
    request = _serve()
    _become(request)
    try:
        status = main(request["argv"])
    except SystemExit as stop:
        status = stop.code or 0
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # tearing down all that was imported takes longer than the command
