"""What a run tells: metrics.jsonl, TensorBoard, and a live bar on a terminal or plain lines in a pipe."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .. import files, json_text
from ..errors import Failure
from .event_file import EventFile


class Journal:
    """Records of a run in OUT/metrics.jsonl and OUT/tensorboard, progress on stderr.

    `after` is the step of the checkpoint that the run goes on from, None at its very start: records that a predecessor
    wrote later are dropped, since their work was lost. Raises Failure where the files cannot be written.
    """

    def __init__(self, out: Path, total_steps: int, after: int | None, label: str) -> None:
        self.path = out / "metrics.jsonl"
        self.total_steps = total_steps
        self.label = label
        with self._writing():
            _keep_until(self.path, -1 if after is None else after)
            self._file = self.path.open("a")
            self._board = _board(out / "tensorboard", 0 if after is None else after + 1)
        self._bar = _bar(label, total_steps, after or 0) if sys.stderr.isatty() else None

    def record(self, **values: Any) -> None:
        """One line of metrics.jsonl; every number but the step is also a TensorBoard scalar."""
        with self._writing():
            self._file.write(json.dumps(values) + "\n")
            self._file.flush()
            if self._board is not None:
                self._board.add(values["step"], {name: value for name, value in values.items() if name != "step"})

    def sync(self) -> None:
        """Returns once all records are on the disk. A checkpoint must not get there before the records up to it."""
        with self._writing():
            files.sync(self.path)

    def progress(self, step: int, text: str, line: bool) -> None:
        """Moves the bar to `step`; without a terminal prints `text` as a line if `line`."""
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step, text=text)
        elif line:
            self.say(f"{self.label}  step {step:>{len(str(self.total_steps))}}/{self.total_steps}  {text}")

    def say(self, text: str) -> None:
        with suppress(OSError):  # whoever read this has gone, such as a closed terminal: no reason to end a run
            if self._bar is not None:
                self._bar.console.print(text, highlight=False, markup=False, soft_wrap=True)
            else:
                print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            with suppress(OSError):
                self._bar.stop()
        with suppress(OSError):  # a full disk, which the failed record has told
            self._file.close()
        if self._board is not None:
            with suppress(OSError):
                self._board.close()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise Failure(
                f"cannot write {self.path}: {error.strerror}; make it writable with some space free, then --resume"
            ) from error


class SilentJournal(Journal):
    """The journal of a process that leaves the telling to another."""

    def __init__(self) -> None:
        pass

    def record(self, **values: Any) -> None:
        pass

    def sync(self) -> None:
        pass

    def progress(self, step: int, text: str, line: bool) -> None:
        pass

    def say(self, text: str) -> None:
        pass

    def close(self) -> None:
        pass


def read_metrics(out: Path) -> list[dict[str, Any]]:
    """The records of a run, oldest first; a half-written last line is left out."""
    path = out / "metrics.jsonl"
    records = []
    for line in files.read(path).splitlines() if path.exists() else []:
        try:
            records.append(json_text.parse_object(line))
        except ValueError:
            break
    return records


def _keep_until(path: Path, step: int) -> None:
    kept = [record for record in read_metrics(path.parent) if record["step"] <= step]
    files.write(path, "".join(json.dumps(record) + "\n" for record in kept))


def _board(folder: Path, purge: int) -> EventFile | None:
    try:
        return EventFile(folder, purge)
    except ImportError:  # metrics.jsonl holds the same numbers
        return None


def _bar(label: str, total: int, step: int) -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = [
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}"),
    ]
    bar = Progress(*columns, console=Console(stderr=True))
    bar.add_task(label, total=total, completed=step, text="")
    bar.start()
    return bar
