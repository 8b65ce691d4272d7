"""One run of a grid, in the process that does it: training, then a look inside the model."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from io import TextIOWrapper
from statistics import median
from typing import Any

import torch

from ..analysis.measure.probe import probe
from ..data.corpus import load_corpus, validation_batches
from ..errors import Failure
from ..files import opened_if_regular
from ..run import hardware
from ..run.config import TrainConfig
from ..train.journal import read_metrics
from ..train.loop import Watch
from ..train.trainer import train

PROBE_BATCHES = 4


Measure = Callable[[Any], dict[str, Any]]
"""Of the configuration of a run, for most a TrainConfig."""


def send_result(measure: Measure, config: Any, sender: Any, threads: int | None) -> None:
    """Sends what `measure` returns or raises. With `threads`, so many are used and progress goes to a file."""
    threading.Thread(target=_follow_parent, daemon=True).start()
    try:
        if threads is not None:
            torch.set_num_threads(threads)
            config.out.mkdir(parents=True, exist_ok=True)
            log = open(config.out / "log.txt", "ab", opener=opened_if_regular)  # noqa: SIM115
            sys.stderr = TextIOWrapper(log, "utf-8", "backslashreplace", line_buffering=True)
        answer: Any = measure(config)
    except Exception as error:
        error.add_note(traceback.format_exc())
        answer = error
    with suppress(BrokenPipeError):  # nobody is left to hear it
        sender.send(answer)


def train_and_probe(config: TrainConfig, watch: Watch | None = None) -> dict[str, Any]:
    """Trains to the end, from the checkpoint if there is one; the result, its curves and what `probe` finds inside."""
    outcome = train(config, resume=(config.out / "config.json").exists(), watch=watch)
    if not outcome.finished:
        raise Failure(f"the run in {config.out} was stopped at step {outcome.step}; call again to continue")
    device = hardware.find_device(config.device)
    with hardware.autocast(device, hardware.find_precision(config.precision, device)):
        inside = probe(outcome.model, probe_batches(config))
    records = read_metrics(config.out)
    return {
        "residual": config.model.residual,
        "seed": config.seed,
        "parameters": config.model.parameter_counts()["total"],
        "tokens": outcome.tokens,
        "val_loss": outcome.val_loss,
        "tokens_per_second": median(r["tokens_per_second"] for r in records if "tokens_per_second" in r),
        "peak_memory_bytes": outcome.peak_memory_bytes,
        "curve": _columns(records, "loss"),
        "val_curve": _columns(records, "val_loss"),
        **inside,
    }


def _follow_parent() -> None:
    """Ends this process, checkpoint and all, when the grid that started it is gone."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)


def probe_batches(config: TrainConfig) -> Any:
    """The batches on which a model is looked into."""
    corpus = load_corpus(config.data, config.tokenizer, config.cache_dir, text_column=config.text_column)
    tokens = PROBE_BATCHES * config.batch_size * config.context
    return validation_batches(corpus.validation, config.batch_size, config.context, tokens)


def _columns(records: list[dict[str, Any]], value: str) -> dict[str, list[Any]]:
    rows = [record for record in records if value in record]
    return {name: [row[name] for row in rows] for name in ("step", "tokens", value)}
