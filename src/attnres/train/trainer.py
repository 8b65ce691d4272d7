"""One loop for every model: batches, accumulation, schedule, validation, checkpoints, and a clean way out."""

from __future__ import annotations

import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import Failure, UsageError
from ..model import Decoder
from . import checkpoint, hardware
from .config import TrainConfig
from .data import Batches, Corpus, load_corpus, validation_batches
from .diagnose import first_non_finite
from .journal import Journal
from .optim import build_optimizer


@dataclass
class Result:
    """How a run ended. `finished` is False if a signal stopped it; `val_loss` is in nats per token."""

    finished: bool
    step: int
    tokens: int
    val_loss: float
    tokens_per_second: float
    peak_memory_bytes: int
    model: Decoder


def train(config: TrainConfig, resume: bool = False) -> Result:
    """Runs `config` to its last step, or to a SIGTERM or Ctrl-C, which saves a checkpoint first.

    With `resume` it goes on from the newest whole checkpoint in config.out (from the start if there is none); on a CPU
    the loss curve is then bit-identical to an uninterrupted run's. Raises UsageError for bad input and Failure for a
    full disk, a damaged checkpoint or a loss that is not finite.
    """
    _check_folder(config.out, resume)
    corpus = load_corpus(config.data, config.tokenizer, config.cache_dir, text_column=config.text_column)
    config = config.with_vocabulary(corpus.tokenizer.vocab_size)
    if resume:
        checkpoint.check_compatible(read_config(config.out).curve(), config.curve())
    _write_config(config)
    corpus.tokenizer.save(config.out)
    return Trainer(config, corpus, checkpoint.latest(config.out / "checkpoints")).run()


class Trainer:
    """The state of one run between two steps."""

    def __init__(self, config: TrainConfig, corpus: Corpus, saved: Path | None = None) -> None:
        self.config = config
        self.corpus = corpus
        self.device = hardware.find_device(config.device)
        self.precision = hardware.find_precision(config.precision, self.device)
        self.model = Decoder(config.model, config.seed).to(self.device)
        self.model.enable_checkpointing(config.checkpointing)
        self.optimizer = build_optimizer(self.model, config.optim)
        self.step = 0
        self.saved_at: Path | None = None
        if saved is not None:
            self._restore(saved)
        self.loss: Callable[[Tensor, Tensor], Tensor] = self._loss
        if config.compile:
            self.loss = torch.compile(self._loss)

    def run(self) -> Result:
        config = self.config
        peak = hardware.peak_flops(self.device, self.precision)
        flops = config.model.flops_per_token(config.context)
        label = config.model.residual
        counts = config.model.parameter_counts()
        journal = Journal(config.out, config.steps, self.step, label)
        journal.say(
            f"{label}: {counts['total']:,} parameters, {flops / 1e6:.1f} MFLOP a token, "
            f"{config.tokens_per_step:,} tokens a step, {hardware.describe(self.device)}, {self.precision}"
        )
        batches = self._batches()
        rates: list[float] = []
        val_loss = math.nan
        try:
            with _stop_signals() as stopped:
                if self.step == 0:
                    val_loss = self._validated(journal)
                while self.step < config.steps and not stopped:
                    began = time.perf_counter()
                    loss, grad_norm, rate = self._train_step(batches)
                    self.step += 1
                    rates.append(config.tokens_per_step / (time.perf_counter() - began))
                    speed = median(rates[-config.log_every :])
                    log = self.step % config.log_every == 0 or self.step == config.steps
                    journal.progress(self.step, f"loss {loss:.4f}  {speed:,.0f} tokens/s", log)
                    if log:
                        journal.record(
                            step=self.step,
                            tokens=self.tokens,
                            loss=loss,
                            lr=rate,
                            grad_norm=grad_norm,
                            tokens_per_second=speed,
                            mfu=speed * flops / peak,
                        )
                    if self.step % config.validate_every == 0 or self.step == config.steps:
                        val_loss = self._validated(journal)
                    if self.step % config.checkpoint_every == 0 or self.step == config.steps:
                        self._save()
                if stopped and self.step < config.steps:
                    self._save()
                    journal.say(f"stopped at step {self.step}, saved as {self.saved_at}; go on with --resume")
            if math.isnan(val_loss):
                val_loss = self._validation_loss()
        finally:
            journal.close()
        return Result(
            finished=self.step >= config.steps,
            step=self.step,
            tokens=self.tokens,
            val_loss=val_loss,
            tokens_per_second=median(rates[len(rates) // 10 :]) if rates else math.nan,
            peak_memory_bytes=hardware.peak_memory(self.device),
            model=self.model,
        )

    @property
    def tokens(self) -> int:
        """Tokens trained on so far."""
        return self.step * self.config.tokens_per_step

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        config = self.config
        return iter(
            Batches(
                self.corpus.train,
                config.batch_size,
                config.context,
                config.seed,
                start_step=self.step * config.accumulate,
                num_workers=config.workers,
            )
        )

    def _train_step(self, batches: Iterator[tuple[Tensor, Tensor]]) -> tuple[float, float, float]:
        """One optimizer step; returns its mean loss, the gradient norm before clipping and the learning rate."""
        total = 0.0
        self.model.train()
        for _ in range(self.config.accumulate):
            inputs, targets = (part.to(self.device, non_blocking=True) for part in next(batches))
            loss = self.loss(inputs, targets)
            value = loss.item()
            if not math.isfinite(value):
                raise Failure(self._non_finite(f"loss is {value}", inputs))
            (loss / self.config.accumulate).backward()
            total += value / self.config.accumulate
        grad_norm = self.optimizer.clip_gradients().item()
        if not math.isfinite(grad_norm):
            raise Failure(self._non_finite(f"gradient norm is {grad_norm} at loss {total:.4f}", inputs))
        rate = self.optimizer.set_learning_rate(self.step, self.config.steps)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total, grad_norm, rate

    def _loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        with hardware.autocast(self.device, self.precision):
            logits = self.model(inputs)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    @torch.no_grad()
    def _validation_loss(self) -> float:
        config = self.config
        self.model.eval()
        losses = [
            self.loss(inputs.to(self.device), targets.to(self.device)).item()
            for inputs, targets in validation_batches(
                self.corpus.validation, config.batch_size, config.context, config.validation_tokens
            )
        ]
        return sum(losses) / len(losses)

    def _validated(self, journal: Journal) -> float:
        loss = self._validation_loss()
        journal.record(step=self.step, tokens=self.tokens, val_loss=loss)
        journal.progress(self.step, f"validation loss {loss:.4f}", True)
        return loss

    def _save(self) -> None:
        config = self.config
        state = {"config": config.to_dict(), "corpus": self.corpus.fingerprint, "rng": checkpoint.rng_state()}
        self.saved_at = checkpoint.save(
            config.out / "checkpoints",
            self.step,
            self.model.state_dict(),
            self.optimizer.state_dict(),
            state,
            config.keep,
        )

    def _restore(self, path: Path) -> None:
        saved = checkpoint.load(path, self.device)
        theirs = TrainConfig.from_dict(saved.state["config"]).curve()
        checkpoint.check_compatible(theirs, self.config.curve())
        if saved.state["corpus"] != self.corpus.fingerprint:
            raise UsageError(
                "the corpus is not the one that the checkpoint was trained on: its files, its tokenizer or the Python "
                "version changed; resume with the same --data, or start a new run"
            )
        self.model.load_state_dict(saved.model_tensors)
        self.optimizer.load_state_dict(saved.optimizer_state)
        checkpoint.set_rng_state(saved.state["rng"])
        self.step, self.saved_at = saved.step, path

    def _non_finite(self, what: str, inputs: Tensor) -> str:
        where = first_non_finite(self.model, inputs, hardware.autocast(self.device, self.precision))
        last = f"the last good checkpoint is {self.saved_at}" if self.saved_at else "there is no checkpoint yet"
        return f"step {self.step + 1}: the {what}; {where}; {last}; lower --optim.lr or lengthen --optim.warmup-steps"


def load_run(path: Path, device: str = "auto") -> tuple[Decoder, TrainConfig]:
    """The model of a run folder, with the weights of its newest whole checkpoint, and its configuration."""
    config = read_config(path)
    newest = checkpoint.latest(path / "checkpoints")
    if newest is None:
        raise Failure(f"{path} has no whole checkpoint; train on with --resume first")
    where = hardware.find_device(device)
    model = Decoder(config.model).to(where)
    model.load_state_dict(checkpoint.load(newest, where).model_tensors)
    return model.eval(), config


def read_config(path: Path) -> TrainConfig:
    """The configuration of a run folder. Raises UsageError if there is none."""
    file = path / "config.json"
    if not file.exists():
        raise UsageError(f"{path} is not a run: it has no config.json; give the --out of an `attnres train`")
    try:
        return TrainConfig.from_dict(json.loads(file.read_text()))
    except json.JSONDecodeError as error:
        raise Failure(f"{file} is damaged: {error}") from error


def _check_folder(out: Path, resume: bool) -> None:
    exists = (out / "config.json").exists()
    if exists and not resume:
        raise UsageError(f"out holds a run already: {out}; pass --resume to go on with it, or another --out")
    if resume and not exists:
        raise UsageError(f"nothing to resume in {out}: it has no config.json; leave out --resume to start there")


def _write_config(config: TrainConfig) -> None:
    file = config.out / "config.json"
    scratch = config.out / "config.json.tmp"
    try:
        config.out.mkdir(parents=True, exist_ok=True)
        scratch.write_text(json.dumps(config.to_dict(), indent=2) + "\n")
        os.replace(scratch, file)
    except OSError as error:
        raise Failure(f"cannot write {file}: {error.strerror}; choose another --out") from error


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """A list that gets the signal's number when SIGTERM or SIGINT arrives; a second Ctrl-C ends the process at once."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # Python delivers signals to the main thread only
        yield received
        return

    def note(number: int, frame: Any) -> None:
        received.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
