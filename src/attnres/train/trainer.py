"""One loop for every model: batches, accumulation, schedule, validation, checkpoints, and a clean way out."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..data.corpus import Batches, Corpus, load_corpus, validation_batches
from ..errors import Failure, UsageError
from ..model import Decoder
from ..parallel.mesh import launched_processes
from ..run import checkpoint, hardware
from ..run import folder as run_folder
from ..run.config import TrainConfig
from .balance import balance_experts
from .diagnose import first_non_finite, first_non_finite_gradient, non_finite_tensor
from .journal import Journal
from .optim import build_optimizer
from .shortage import check_size, model_too_large, telling_shortage
from .signals import STOPS, starting_deaf_processes, stop_signals

Watch = Callable[[Decoder, int], None]


@dataclass
class Result:
    """How a run ended. If a signal stopped it, `finished` is False and `val_loss` may be NaN.

    val_loss: nats per token; tokens_per_second: while training, without validation; peak_memory_bytes: the most of all
    the processes that worked on the run.
    """

    finished: bool
    step: int
    tokens: int
    val_loss: float
    tokens_per_second: float
    peak_memory_bytes: int
    model: Decoder


def train(config: TrainConfig, resume: bool = False, watch: Watch | None = None) -> Result:
    """Runs `config` to its last step, or to a SIGTERM, SIGHUP or Ctrl-C, which saves a checkpoint first.

    With `resume` it goes on from the newest whole checkpoint in config.out (from the start if there is none); on a CPU
    the loss curve is then bit-identical to an uninterrupted run's. Raises UsageError for bad input, with nothing
    written, and Failure for a full disk, a damaged checkpoint, too little memory or a loss that is not finite.

    `watch(model, step)` is called after each validation of a run in one process.

    With `config.parallel` this is what every process of the job calls, and every one returns the same result.
    """
    if config.parallel.world_size > 1 or launched_processes() > 1:
        from .parallel_trainer import train_in_parallel

        return train_in_parallel(config, resume)
    config.parallel.check(1, config.model, config.batch_size, config.context)
    run_folder.check_folder(config.out, resume)
    config.model.check_residual()  # refuses bad options before the corpus is read
    corpus = load_corpus(config.data, config.tokenizer, config.cache_dir, text_column=config.text_column)
    config = config.with_vocabulary(corpus.tokenizer.vocab_size)
    if resume:
        config = run_folder.continued(run_folder.read_config(config.out), config)
    config = run_folder.settled(config)
    check_size(config)
    with telling_shortage(model_too_large):
        trainer = Trainer(config, corpus)
    trainer.watch = watch
    with run_folder.held(config.out):
        run_folder.check_folder(config.out, resume)
        if resume:
            with telling_shortage(model_too_large):
                trainer.restore(run_folder.newest_checkpoint(config.out))
        run_folder.write_config(config)
        corpus.tokenizer.save(config.out)
        return trainer.run()


class Trainer:
    """The state of one run between two steps. Raises UsageError for bad input before the first of them."""

    watch: Watch | None = None

    def __init__(self, config: TrainConfig, corpus: Corpus) -> None:
        self.config = config
        self.corpus = corpus
        self.device = hardware.find_device(config.device)
        self.precision = hardware.find_precision(config.precision, self.device)
        self.model = Decoder(config.model, config.seed).to(self.device)
        self.model.enable_checkpointing(config.checkpointing)
        self.optimizer = build_optimizer(self.model, config.optim)
        self.loss: Callable[[Tensor, Tensor], Tensor] = torch.compile(self._loss) if config.compile else self._loss
        self.step = 0
        self.saved_at: Path | None = None
        self.earlier_peak_memory = 0
        self.expert_loads: dict[str, float] = {}
        self._batches()  # this and the next two refuse what does not fit
        self._validation()
        self.optimizer.set_learning_rate(0, config.steps)

    def restore(self, path: Path | None) -> None:
        """Goes back to a checkpoint of this run; nothing happens without one."""
        if path is None:
            return
        stored = run_folder.open_checkpoint(path, self.config)
        state = stored.state()
        self._check_continuation(state, stored.step)
        checkpoint.restore(stored, [self.model], self.optimizer)
        if "rng" in state:  # many processes have none in common
            checkpoint.set_rng_state(state["rng"])
        self.step, self.saved_at = stored.step, path
        self.earlier_peak_memory = state["peak_memory_bytes"]

    def _check_continuation(self, saved: dict[str, Any], step: int) -> None:
        run_folder.check_length(saved["config"]["steps"], step, self.config)
        if saved["corpus"] != self.corpus.fingerprint:
            raise UsageError(
                "data is not the corpus that the checkpoint was trained on: its files, its tokenizer or the Python "
                "version changed; resume with the same --data, or start a new run"
            )

    def run(self) -> Result:
        config = self.config
        rates: list[float] = []
        val_loss = math.nan
        after = None if self.saved_at is None else self.step
        with (
            stop_signals() as received,
            closing(self._journal(after)) as journal,
            telling_shortage(self._step_too_large),
        ):
            flops, peak = self._announce(journal)
            with starting_deaf_processes(*STOPS):  # workers end when this process does
                batches = iter(self._batches())
            if self.saved_at is None and not self._stopped(received):
                val_loss = self._validated(journal)
            while self.step < config.steps and not self._stopped(received):
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
                        **self._further_metrics(),
                    )
                if self.step % config.validate_every == 0 or self.step == config.steps:
                    val_loss = self._validated(journal)
                if self.step % config.checkpoint_every == 0 or self.step == config.steps:
                    self._save(journal)
            finished = self.step >= config.steps
            if finished and math.isnan(val_loss):  # it was finished when it was resumed
                val_loss = self._validation_loss()
            if not finished:
                if rates and self.step % config.checkpoint_every:
                    self._save(journal)
                where = f"saved as {self.saved_at}" if self.saved_at else "with nothing to save yet"
                journal.say(f"stopped at step {self.step}, {where}; go on with --resume")
        return Result(
            finished=finished,
            step=self.step,
            tokens=self.tokens,
            val_loss=val_loss,
            tokens_per_second=median(rates[len(rates) // 10 :]) if rates else math.nan,
            peak_memory_bytes=self._peak_memory(),
            model=self.model,
        )

    @property
    def tokens(self) -> int:
        """Tokens trained on so far."""
        return self.step * self.config.tokens_per_step

    @property
    def _label(self) -> str:
        return self.config.model.residual

    def _announce(self, journal: Journal) -> tuple[float, float]:
        """Says what is trained; returns training FLOPs per token and the machine's peak FLOP/s."""
        config = self.config
        flops = config.model.flops_per_token(config.context)
        journal.say(
            f"{self._label}: {config.model.parameter_counts()['total']:,} parameters, {flops / 1e6:.1f} MFLOP a token, "
            f"{config.tokens_per_step:,} tokens a step, {hardware.describe(self.device)}, {self.precision}"
        )
        return flops, hardware.peak_flops(self.device, self.precision)

    def _journal(self, after: int | None) -> Journal:
        return Journal(self.config.out, self.config.steps, after, self._label)

    def _stopped(self, received: list[int]) -> bool:
        return bool(received)

    def _further_metrics(self) -> dict[str, float]:
        return self.expert_loads

    def _batches(self) -> Batches:
        config = self.config
        return Batches(
            self.corpus.train,
            config.batch_size,
            config.context,
            config.seed,
            start_step=self.step * config.accumulate,
            num_workers=config.workers,
            pin_memory=self.device.type == "cuda",
        )

    def _validation(self) -> Iterator[tuple[Tensor, Tensor]]:
        config = self.config
        return validation_batches(self.corpus.validation, config.batch_size, config.context, config.validation_tokens)

    def _train_step(self, batches: Iterator[tuple[Tensor, Tensor]]) -> tuple[float, float, float]:
        """One optimizer step; returns its mean loss, the gradient norm before clipping and the learning rate."""
        total = 0.0
        self.model.train()
        for _ in range(self.config.accumulate):
            inputs, targets = (part.to(self.device, non_blocking=True) for part in next(batches))
            loss = self.loss(inputs, targets)
            value = loss.item()
            self._require_finite("loss", value, inputs, self.step + 1)
            (loss / self.config.accumulate).backward()
            total += value / self.config.accumulate
        grad_norm = self.optimizer.clip_gradients().item()
        if not math.isfinite(grad_norm):
            where = first_non_finite_gradient(self.model)
            raise self._diverged(f"the gradient norm is {grad_norm}", where, self.step + 1)
        rate = self.optimizer.set_learning_rate(self.step, self.config.steps)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.expert_loads = balance_experts([self.model])
        return total, grad_norm, rate

    def _loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        with hardware.autocast(self.device, self.precision):
            logits = self.model(inputs)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    @torch.no_grad()
    def _validation_loss(self) -> float:
        self.model.eval()
        total, tokens = 0.0, 0
        for inputs, targets in self._validation():
            loss = self.loss(inputs.to(self.device), targets.to(self.device)).item()
            self._require_finite("validation loss", loss, inputs.to(self.device), self.step)
            total += loss * targets.numel()  # the last batch may have fewer rows
            tokens += targets.numel()
        return total / tokens

    def _validated(self, journal: Journal) -> float:
        loss = self._validation_loss()
        journal.record(step=self.step, tokens=self.tokens, val_loss=loss)
        journal.progress(self.step, f"validation loss {loss:.4f}", True)
        if self.watch is not None:
            self.watch(self.model, self.step)
        return loss

    def _save(self, journal: Journal) -> None:
        if wrong := non_finite_tensor(self.model):
            raise self._diverged("the update is not finite", f"{wrong} is not", self.step)
        state = {
            "config": self.config.to_dict(),
            "corpus": self.corpus.fingerprint,
            "rng": checkpoint.rng_state(),
            "peak_memory_bytes": self._peak_memory(),
        }
        journal.sync()
        root = self.config.out / "checkpoints"
        self.saved_at = checkpoint.save_run(root, self.step, [self.model], self.optimizer, state, self.config.keep)

    def _peak_memory(self) -> int:
        return max(self.earlier_peak_memory, hardware.peak_memory(self.device))

    def _step_too_large(self, asked: str) -> str:
        split = "" if self.config.parallel.world_size == 1 else ", or split over more processes"
        return (
            f"step {self.step + 1} ran out of memory{asked}; lower --batch-size (a larger --accumulate keeps a step's "
            f"tokens) or --context, or add --checkpointing{split}; {self._last_good}"
        )

    @property
    def _last_good(self) -> str:
        return f"the last good checkpoint is {self.saved_at}" if self.saved_at else "there is no checkpoint yet"

    def _require_finite(self, name: str, value: float, inputs: Tensor, step: int) -> None:
        if not math.isfinite(value):
            where = first_non_finite(self.model, inputs, hardware.autocast(self.device, self.precision))
            raise self._diverged(f"the {name} is {value}", where, step)

    def _diverged(self, what: str, where: str, step: int) -> Failure:
        return Failure(
            f"step {step}: {what}; {where}; {self._last_good}; start a new run with a lower --optim.lr or a longer "
            "--optim.warmup-steps"
        )
