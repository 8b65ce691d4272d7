"""One loop for every model, in one process or many: batches, schedule, validation, checkpoints, a clean way out.

A run may go on under another split, or in one process (`parallel.share`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from torch import Tensor

from ..data.corpus import Batches, Corpus, validation_batches
from ..errors import Failure, UsageError
from ..model import Decoder
from ..parallel import agreement
from ..parallel.share import Share
from ..run import checkpoint, hardware
from ..run import folder as run_folder
from ..run.config import TrainConfig
from .balance import balance_experts
from .diagnose import first_non_finite, first_non_finite_gradient, non_finite_tensor
from .journal import Journal, SilentJournal
from .optim import build_optimizer
from .shortage import telling_shortage
from .signals import STOPS, signals_blocked, stop_signals

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


class Trainer:
    """The state of one run between two steps, or this process's share of it.

    Raises UsageError for bad input before the first step.
    """

    watch: Watch | None = None

    def __init__(self, config: TrainConfig, corpus: Corpus) -> None:
        self.config = config
        self.corpus = corpus
        self.device = hardware.find_device(config.device)
        self.precision = hardware.find_precision(config.precision, self.device)
        self.share = Share(
            config.model,
            config.parallel,
            self.device,
            batch_size=config.batch_size,
            context=config.context,
            accumulate=config.accumulate,
            seed=config.seed,
            precision=self.precision,
            checkpointing=config.checkpointing,
            compile=config.compile,
        )
        self.optimizer = build_optimizer(self.share.parts, config.optim)
        self.step = 0
        self.saved_at: Path | None = None
        self.earlier_peak_memory = 0
        self.expert_loads: dict[str, float] = {}
        self._batches()  # this and the next two refuse what does not fit
        self._validation()
        self.optimizer.set_learning_rate(0, config.steps)

    @property
    def model(self) -> Any:
        """The decoder; of many processes the part of it that this one holds first."""
        return self.share.parts[0]

    def restore(self, path: Path | None) -> None:
        """Goes back to a checkpoint of this run; nothing happens without one."""
        if path is None:
            return
        stored = run_folder.open_checkpoint(path, self.config)
        state = stored.state()
        self._check_continuation(state, stored.step)
        checkpoint.restore(stored, self.share.parts, self.optimizer)
        if "rng" in state:
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
            with signals_blocked(*STOPS):  # workers end when this process does
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
                        **self.expert_loads,
                        **self.share.traffic(),
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
        parallel = config.parallel
        if not self.share.is_whole:
            sizes = {"dp": parallel.dp, "shard": parallel.shard, "tp": parallel.tp, "pp": parallel.pp}
            split = " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1)
            split += f", experts over {parallel.ep}" if parallel.ep > 1 else ""
            journal.say(f"{self._label}: {parallel.world_size} processes, {split}")
        return flops, hardware.peak_flops(self.device, self.precision) * parallel.world_size

    def _journal(self, after: int | None) -> Journal:
        if agreement.rank() > 0:
            return SilentJournal()
        return Journal(self.config.out, self.config.steps, after, self._label)

    def _stopped(self, received: list[int]) -> bool:
        # a signal that reaches one process must stop all of them after the same step
        return agreement.summed(float(bool(received)), self.device) > 0

    def _batches(self) -> Batches:
        config = self.config
        return Batches(
            self.corpus.train,
            self.share.rows,
            config.context,
            config.seed,
            start_step=self.step * config.accumulate,
            num_workers=config.workers,
            rank=self.share.replica,
            world_size=self.share.replicas,
            pin_memory=self.device.type == "cuda",
        )

    def _validation(self) -> Iterator[tuple[Tensor, Tensor]]:
        config = self.config
        return validation_batches(self.corpus.validation, config.batch_size, config.context, config.validation_tokens)

    def _train_step(self, batches: Iterator[tuple[Tensor, Tensor]]) -> tuple[float, float, float]:
        """One optimizer step; returns its mean loss, the gradient norm before clipping and the learning rate."""
        share, optimizer = self.share, self.optimizer
        own = 0.0
        self._set_training(True)
        for i in range(self.config.accumulate):
            inputs, targets = (part.to(self.device, non_blocking=True) for part in next(batches))
            loss = share.backward(inputs, targets, i == self.config.accumulate - 1)
            if share.is_whole:
                self._require_finite("loss", loss, inputs, self.step + 1)
            own += loss
        share.join_gradients()
        loss = share.mean(own)
        if share.is_whole:
            grad_norm = optimizer.clip_gradients().item()
        else:
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            grad_norm = share.clip(parameters, self.config.optim.clip).item()
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            what = f"the gradient norm is {grad_norm}" if math.isfinite(loss) else f"the loss is {loss}"
            where = "train in one process to see where it begins"
            raise self._diverged(
                what, first_non_finite_gradient(self.model) if share.is_whole else where, self.step + 1
            )
        rate = optimizer.set_learning_rate(self.step, self.config.steps)
        optimizer.step()
        optimizer.zero_grad()
        self.expert_loads = balance_experts(share.parts, share.groups("dp", "shard"), share.groups("pp"))
        return loss, grad_norm, rate

    def _set_training(self, training: bool) -> None:
        for part in self.share.parts:
            part.train(training)

    def _validation_loss(self) -> float:
        self._set_training(False)
        total, tokens = 0.0, 0
        for inputs, targets in self._validation():
            loss = self.share.evaluate(inputs, targets)
            if self.share.is_whole:
                self._require_finite("validation loss", loss, inputs.to(self.device), self.step)
            total += loss
            tokens += targets.numel()
        self.share.end_evaluation()
        return self.share.mean(total) / tokens

    def _validated(self, journal: Journal) -> float:
        loss = self._validation_loss()
        journal.record(step=self.step, tokens=self.tokens, val_loss=loss)
        journal.progress(self.step, f"validation loss {loss:.4f}", True)
        if self.watch is not None:
            self.watch(self.model, self.step)
        return loss

    def _save(self, journal: Journal) -> None:
        wrong = next(filter(None, map(non_finite_tensor, self.share.parts)), None)
        if agreement.summed(float(wrong is not None), self.device):
            where = f"{wrong} is not" if wrong else "a weight or buffer of another process is not"
            raise self._diverged("the update is not finite", where, self.step)
        state = {
            "config": self.config.to_dict(),
            "corpus": self.corpus.fingerprint,
            "peak_memory_bytes": self._peak_memory(),
        }
        if self.share.is_whole:  # many processes have none in common
            state["rng"] = checkpoint.rng_state()
        agreement.on_first(journal.sync)
        root, keep = self.config.out / "checkpoints", self.config.keep
        self.saved_at = checkpoint.save_run(root, self.step, self.share.parts, self.optimizer, state, keep)

    def _peak_memory(self) -> int:
        return max(agreement.gathered(max(self.earlier_peak_memory, hardware.peak_memory(self.device))))

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
