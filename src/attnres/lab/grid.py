"""Runs as data: a grid of trainings, each in a process of its own, side by side, and continued where it stopped."""

from __future__ import annotations

import csv
import datetime
import io
import json
import multiprocessing
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch

from .. import files, json_text
from ..analysis.draw.style import require_matplotlib
from ..data.corpus import Corpus, load_corpus
from ..errors import Failure, UsageError
from ..run import hardware
from ..run.config import TrainConfig, check_compatible
from ..run.folder import held, read_config, settled
from ..train.signals import signals_blocked
from ..version import __version__
from .worker import Measure, send_result, train_and_probe

# what runs import late, if they do; importing it with torch takes as long as a short run
IMPORTED_BEFORE = ("attnres.lab.worker", "torch._dynamo", "tensorboard.summary.writer.record_writer")

LONGEST_WAIT = 86400.0
"""Seconds; the system call that waits takes no more than some weeks."""


@dataclass(frozen=True)
class Cell:
    """One run of a grid: what it is called in messages, and the training, whose `out` is its own.

    Runs that are no training of `attnres train` override what follows.
    """

    name: str
    config: Any

    @property
    def work(self) -> float:
        """FLOPs of the whole training, by which the time that is left is told."""
        run = self.config
        return run.steps * run.tokens_per_step * run.model.flops_per_token(run.context)

    def check_folder(self) -> None:
        """Raises UsageError if the folder of the run holds another one."""
        out = self.config.out
        if (out / "config.json").exists():
            try:
                saved = read_config(out).with_precision_of(self.config)
                check_compatible(saved.results(), self.config.results())
            except UsageError as error:
                raise UsageError(f"out holds another comparison, choose another --out: in {out} {error}") from error


@contextmanager
def opened(train: TrainConfig) -> Iterator[tuple[TrainConfig, Corpus]]:
    """The training that all runs of a grid share, with room for the tokens of its corpus, and the corpus.

    Within, no other process can open the folder train.out. Raises UsageError where matplotlib is missing, which would
    be missed after the last run, and for a corpus that cannot be had, Failure if another process has the folder.
    """
    require_matplotlib()
    corpus = load_corpus(train.data, train.tokenizer, train.cache_dir, text_column=train.text_column)
    train = settled(train.with_vocabulary(corpus.tokenizer.vocab_size))
    with held(train.out, wait=False):
        yield train, corpus


def run_grid(
    cells: Sequence[Cell],
    *,
    jobs: int = 1,
    minutes: float | None = None,
    keep_checkpoints: bool = True,
    measure: Measure = train_and_probe,
    preload: Sequence[str] = IMPORTED_BEFORE,
) -> list[dict[str, Any]]:
    """The results of all cells, in their order: result.json of each, what `measure` returns for its training.

    A cell that is finished is not repeated, one that was cut off goes on from its checkpoint: calling again after a
    kill continues the grid.

    Args:
        jobs: runs at the same time, which share the cores of a CPU. With more than one, each run's own progress goes
            to log.txt in its folder.
        minutes: stop after so many, with what is running saved.
        keep_checkpoints: keep the weights of finished runs.
        preload: modules that are imported once for all runs.

    Raises UsageError if a folder holds another run or jobs or minutes are not positive, Failure where a run fails (with
    several jobs the others end first) or time is up.
    """
    check_limits(jobs, minutes)
    for cell in cells:
        cell.check_folder()
    results: dict[int, dict[str, Any]] = {}
    for i, cell in enumerate(cells):
        if (file := cell.config.out / "result.json").exists():
            results[i] = _finished(file)
    grid = _Grid(cells, jobs, results, keep_checkpoints, measure, preload)
    try:
        grid.run(None if minutes is None else time.monotonic() + 60 * minutes)
    except BaseException:
        grid.stop()
        raise
    return [results[i] for i in range(len(cells))]


def check_limits(jobs: int, minutes: float | None) -> None:
    """Raises UsageError for numbers that `run_grid` cannot work with."""
    if jobs < 1:
        raise UsageError(f"jobs must be a positive whole number; it is {jobs}")
    if minutes is not None and not minutes > 0:
        raise UsageError(f"minutes must be a positive number; it is {minutes}")


class _Grid:
    """The processes of a grid that are running."""

    def __init__(
        self,
        cells: Sequence[Cell],
        jobs: int,
        results: dict[int, dict[str, Any]],
        keep_checkpoints: bool,
        measure: Measure,
        preload: Sequence[str],
    ) -> None:
        self.cells, self.jobs, self.results, self.keep_checkpoints = cells, jobs, results, keep_checkpoints
        self.measure, self.preload = measure, preload
        self.running: dict[Any, tuple[int, Any, float]] = {}
        self.failures: dict[str, Exception] = {}
        self.waiting = [i for i in range(len(cells)) if i not in results]
        self.seconds = self.work = 0.0  # of the runs that this process has finished

    def run(self, deadline: float | None) -> None:
        while self.waiting or self.running:
            while self.waiting and len(self.running) < self.jobs:
                self._start(self.waiting.pop(0))
            left = None if deadline is None else min(LONGEST_WAIT, max(0.0, deadline - time.monotonic()))
            ready = wait(list(self.running), left)
            for receiver in ready:
                self._take(receiver)
            if deadline is not None and not ready and time.monotonic() >= deadline:
                self.stop()
                raise Failure(f"time is up with {len(self.results)} of {len(self.cells)} runs finished; call again")
        if self.failures:
            names = list(self.failures)
            others = f" (so did {', '.join(names[1:])})" if len(names) > 1 else ""
            error = self.failures[names[0]]
            raise Failure(f"{names[0]} failed{others}, the other runs are finished: {error}") from error

    def stop(self) -> None:
        """Ends what is running; every run saves a checkpoint first."""
        processes = {self.cells[i].config.out: process for i, process, _ in self.running.values()}
        for process in processes.values():
            process.terminate()
        try:
            for out, process in processes.items():
                process.join()
                print(f"stopped in {out}; call again to continue", file=sys.stderr)
        finally:
            for process in processes.values():
                process.kill()  # a second Ctrl-C does not wait

    def _start(self, i: int) -> None:
        cell = self.cells[i]
        print(f"[{i + 1}/{len(self.cells)}] {cell.name}", file=sys.stderr, flush=True)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([*self.preload])
        receiver, sender = context.Pipe(duplex=False)
        threads = max(1, len(os.sched_getaffinity(0)) // self.jobs) if self.jobs > 1 else None
        process = context.Process(target=send_result, args=(self.measure, cell.config, sender, threads))
        with signals_blocked(signal.SIGINT):  # on Ctrl-C this process tells it to stop
            # threads that spin at barriers crawl as soon as another program wants a core
            os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
            try:
                process.start()
            except (EOFError, OSError) as error:  # what forks the runs was killed
                raise Failure(
                    f"no process could be started for {cell.name} ({type(error).__name__}); call again to continue"
                ) from error
        sender.close()
        self.running[receiver] = (i, process, time.monotonic())

    def _take(self, receiver: Any) -> None:
        i, process, began = self.running[receiver]
        cell = self.cells[i]
        try:
            answer = receiver.recv()
        except (EOFError, OSError):  # it was killed, perhaps in the middle of its answer
            process.join()
            code = process.exitcode
            answer = Failure(f"the run in {cell.config.out} ended with exit code {code}; call again to continue")
        process.join()
        del self.running[receiver]
        receiver.close()
        if isinstance(answer, Exception):
            if self.jobs == 1:
                raise answer
            self.failures[cell.name] = answer
            if self.waiting or self.running:
                print(f"{cell.name} failed, the others go on: {answer}", file=sys.stderr, flush=True)
            return
        write_json(cell.config.out / "result.json", answer)
        self.results[i] = answer
        if not self.keep_checkpoints:
            shutil.rmtree(cell.config.out / "checkpoints", ignore_errors=True)
        self.seconds += time.monotonic() - began
        self.work += cell.work
        if self.jobs > 1:
            to_do = sum(self.cells[i].work for i in self.waiting)
            to_do += sum(self.cells[i].work for i, *_ in self.running.values()) / 2
            left = to_do * self.seconds / self.work / self.jobs
            counts = f"{len(self.results)} of {len(self.cells)} runs finished, about {left / 60:.0f} minutes left"
            print(f"{counts}: {cell.name}, validation loss {answer['val_loss']:.4f}", file=sys.stderr, flush=True)


def provenance(config: TrainConfig, corpus: Corpus, command: str) -> dict[str, Any]:
    """Where, with what and on what the numbers of a results file were made."""
    return {
        **made_here(command, config.device, config.precision),
        "corpus": {"name": corpus.name, "train_tokens": len(corpus.train), "val_tokens": len(corpus.validation)},
        "train": config.to_dict(),
    }


def made_here(command: str, device_name: str, precision: str) -> dict[str, Any]:
    """By which command and code numbers were made, when, and on which machine."""
    device = hardware.find_device(device_name)
    return {
        "command": command,
        "version": __version__,
        "commit": _commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": hardware.describe(device),
        "dtype": hardware.name_of(hardware.find_precision(precision, device)),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def write_json(path: Path, value: Any) -> None:
    """Writes JSON, whole or not at all. Raises Failure if it cannot be written."""
    _write(path, json.dumps(value, indent=1) + "\n")


def write_csv(path: Path, rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> None:
    """Writes these columns of rows that may have more, whole or not at all. Raises Failure if it cannot be written."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    _write(path, text.getvalue())


def _write(path: Path, text: str) -> None:
    try:
        files.write(path, text)
    except OSError as error:
        raise Failure(f"cannot write {path}: {error.strerror}; free some space and call again") from error


def _finished(file: Path) -> dict[str, Any]:
    try:
        return json_text.parse_object(files.read(file))
    except (OSError, ValueError) as error:
        raise Failure(f"{file} cannot be read: {error}; remove it, and its run is done again") from error


def _commit() -> str | None:
    """The commit of this code; None where the repository around it, such as that of a virtual environment's owner, does
    not hold it."""
    try:
        if _git("ls-files", "--error-unmatch", Path(__file__).name) is None:
            return None
        return _git("rev-parse", "--short", "HEAD")
    except OSError:
        return None


def _git(*arguments: str) -> str | None:
    done = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True)
    return done.stdout.strip() or None if done.returncode == 0 else None
