"""What a run tells: metrics.jsonl, TensorBoard, and a live bar on a terminal or plain lines in a pipe."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from ..errors import Failure


class Journal:
    """Records of a run in OUT/metrics.jsonl and OUT/tensorboard, progress on stderr.

    A resumed run drops the records after `step`, which its predecessor wrote but whose work was lost.
    """

    def __init__(self, out: Path, total_steps: int, step: int, label: str) -> None:
        self.path = out / "metrics.jsonl"
        self.total_steps = total_steps
        self.label = label
        try:
            _keep_until(self.path, step)
            self._file = self.path.open("a")
        except OSError as error:
            raise Failure(f"cannot write {self.path}: {error.strerror}; choose another --out") from error
        self._board = _tensorboard(out / "tensorboard", step)
        self._bar = _bar(label, total_steps, step) if sys.stderr.isatty() else None

    def record(self, **values: Any) -> None:
        """One line of metrics.jsonl; every number but the step is also a TensorBoard scalar."""
        try:
            self._file.write(json.dumps(values) + "\n")
            self._file.flush()
        except OSError as error:
            raise Failure(f"cannot write {self.path}: {error.strerror}; free some space and --resume") from error
        if self._board is not None:
            for name, value in values.items():
                if name != "step" and value is not None:
                    self._board.add_scalar(name, value, values["step"])

    def progress(self, step: int, text: str, line: bool) -> None:
        """Moves the bar to `step`; without a terminal prints `text` as a line if `line`."""
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step, text=text)
        elif line:
            self.say(f"{self.label}  step {step:>{len(str(self.total_steps))}}/{self.total_steps}  {text}")

    def say(self, text: str) -> None:
        if self._bar is not None:
            self._bar.console.print(text, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()
        if self._bar is not None:
            self._bar.stop()


def read_metrics(out: Path) -> list[dict[str, Any]]:
    """The records of a run, oldest first; a half-written last line is left out."""
    path = out / "metrics.jsonl"
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def _keep_until(path: Path, step: int) -> None:
    kept = [record for record in read_metrics(path.parent) if record["step"] <= step]
    scratch = path.with_suffix(".tmp")
    scratch.write_text("".join(json.dumps(record) + "\n" for record in kept))
    os.replace(scratch, path)


def _tensorboard(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(folder, purge_step=step + 1)


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
