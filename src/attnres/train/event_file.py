"""Scalars for TensorBoard, each written before the next; torch's SummaryWriter writes from a thread, minutes later.

Source of the format: tensorboard's own record writer and protocol buffers.
"""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from typing import Any


class EventFile:
    """A new event file in `folder`. TensorBoard forgets what earlier files there hold from step `purge` on.

    Raises ImportError where tensorboard is not installed, OSError where the file cannot be written.
    """

    def __init__(self, folder: Path, purge: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = Event, Summary
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns() // 10**9:010d}.{socket.gethostname()}.{os.getpid()}"
        self._file = (folder / name).open("ab")
        self._records = RecordWriter(self._file)
        self._write(file_version="brain.Event:2")
        self._write(step=purge, session_log=SessionLog(status=SessionLog.START))

    def add(self, step: int, scalars: dict[str, float]) -> None:
        values = [self._summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
        self._write(step=step, summary=self._summary(value=values))

    def close(self) -> None:
        self._file.close()

    def _write(self, **fields: Any) -> None:
        self._records.write(self._event(wall_time=time.time(), **fields).SerializeToString())
        self._records.flush()
