"""One arm and seed, in a process of its own: a transformers Trainer that can be killed and goes on."""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from .. import files
from ..errors import Failure
from ..hf.convert.folder import write_folder
from ..lab.experiment import folder
from ..run import hardware
from ..train.journal import Journal, read_metrics
from ..train.signals import stop_signals
from . import rows as stored
from .config import UpgradeConfig
from .corpus import HELD_OUT, TRAIN
from .held_out import Losses, losses
from .models import finished, open_arm, optimizer, trained

WHOLE = "whole"
"""The file that says that a checkpoint was written to its end."""
LINES = 200
"""Records of the training loss in a run, at most."""


@dataclass(frozen=True)
class Arm:
    """One run. packed: whether rows hold several sequences; keep_model: whether the model is written at the end."""

    upgrade: UpgradeConfig
    residual: str
    seed: int
    packed: bool
    keep_model: bool

    @property
    def out(self) -> Path:
        return self.upgrade.out / "runs" / f"{folder(self.residual)}-seed{self.seed}"


def train_arm(arm: Arm) -> dict[str, Any]:
    """Trains to the end, from the newest checkpoint if there is one; what the run comes to, in the form of `attnres
    compare`, and "window_losses", [sum, count] of each held-out row.

    Raises Failure for a loss that is not finite, and if a signal stops the run, once it is saved.
    """
    config = arm.upgrade
    # the Trainer would use all devices that it sees
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    arm.out.mkdir(parents=True, exist_ok=True)
    device = hardware.find_device(config.device)
    precision = hardware.find_precision(config.precision, device)
    model = open_arm(config, arm.residual, arm.seed)
    held_out = stored.opened(config.out / HELD_OUT, arm.packed)
    parameters, count = sum(p.numel() for p in model.parameters()), trained(model)
    if count:
        _train(arm, model, held_out, device, precision)
    found = losses(model.to(device), held_out, config.batch_size, device, precision)
    records = read_metrics(arm.out)
    steps = config.steps if count else 0
    tokens = steps * config.rows_per_step * config.context
    speeds = [record["seconds_per_step"] for record in records if "loss" in record]
    pace = median(speeds) if speeds else None
    measured = [record for record in records if "val_loss" in record and record["step"] < steps]
    curve = [(r["step"], r["tokens"], r["val_loss"]) for r in measured] + [(steps, tokens, found.mean)]
    if not count:  # a model that stays as it is has the same loss all along
        looks = [*range(0, config.steps, config.validate_every or 1), config.steps]
        curve = [(step, step * config.rows_per_step * config.context, found.mean) for step in looks]
    peak = hardware.peak_memory(device)
    if arm.keep_model:
        for left in (*arm.out.glob(".model.*.partial"), *arm.out.glob("model")):  # by a process that was killed
            shutil.rmtree(left)
        write_folder(finished(model, config), config.model, arm.out / "model")
    return {
        "residual": arm.residual,
        "seed": arm.seed,
        "parameters": parameters,
        "trained_parameters": count,
        "tokens": tokens,
        "val_loss": found.mean,
        "seconds_per_step": pace,
        "tokens_per_second": None if pace is None else config.rows_per_step * config.context / pace,
        "peak_memory_bytes": peak,
        "curve": {name: [r[name] for r in records if "loss" in r] for name in ("step", "tokens", "loss")},
        "val_curve": dict(zip(("step", "tokens", "val_loss"), map(list, zip(*curve, strict=True)), strict=True)),
        "window_losses": list(zip(found.sums, found.counts, strict=True)),
    }


def _train(arm: Arm, model: Any, held_out: stored.Rows, device: torch.device, precision: torch.dtype) -> None:
    config = arm.upgrade
    train = stored.opened(config.out / TRAIN, arm.packed)
    seen = stored.order(len(train), config.steps * config.rows_per_step, arm.seed)
    checkpoints = arm.out / "checkpoints"
    last = _newest_whole(checkpoints)
    after = None if last is None else int(last.name.rpartition("-")[2])
    journal = Journal(arm.out, config.steps, after, f"{arm.residual}, seed {arm.seed}")
    with stop_signals() as stopped:
        watch = _Watch(
            journal, arm, device, stopped, lambda: losses(model, held_out, config.batch_size, device, precision)
        )
        trainer = _InOrder(
            model,
            TrainingArguments(
                str(checkpoints),
                max_steps=config.steps,
                per_device_train_batch_size=config.batch_size,
                gradient_accumulation_steps=config.accumulate,
                lr_scheduler_type="cosine",
                warmup_steps=config.warmup_steps or 0,
                max_grad_norm=1.0,
                bf16=precision == torch.bfloat16,
                use_cpu=device.type == "cpu",
                seed=arm.seed,
                save_strategy="steps",
                save_steps=config.checkpoint_every or 1,
                save_total_limit=2,
                logging_strategy="steps",
                logging_steps=max(1, config.steps // LINES),
                logging_nan_inf_filter=False,
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=_Seen(train, seen),
            optimizers=(optimizer(model, config), None),
            callbacks=[watch],
        )
        trainer.remove_callback(PrinterCallback)
        try:
            if last is None:
                watch.validate(0)
            trainer.train(resume_from_checkpoint=None if last is None else str(last))
        finally:
            journal.close()
    if trainer.state.global_step < config.steps:
        raise Failure(f"the run in {arm.out} was stopped at step {trainer.state.global_step}; call again to continue")


class _Seen(torch.utils.data.Dataset):
    """Rows in the order in which a training sees them."""

    def __init__(self, rows: stored.Rows, order: Any) -> None:
        self.rows, self.order = rows, order

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, place: int) -> dict[str, torch.Tensor]:
        return self.rows[int(self.order[place])]


class _InOrder(Trainer):
    def get_train_dataloader(self) -> DataLoader:
        """The rows as the dataset has them, which is what every arm of a seed sees."""
        dataset: Any = self.train_dataset
        loader = DataLoader(dataset, batch_size=self.args.per_device_train_batch_size)
        return self.accelerator.prepare(loader)


class _Watch(TrainerCallback):
    """Writes what happens to the journal, held-out losses included, stops at a signal and marks whole checkpoints."""

    def __init__(
        self, journal: Journal, arm: Arm, device: torch.device, stopped: list[int], look: Callable[[], Losses]
    ) -> None:
        self.journal, self.config, self.device, self.stopped, self.look = journal, arm.upgrade, device, stopped, look
        self.began, self.durations = 0.0, list[float]()
        self.val_loss = next((r["val_loss"] for r in reversed(read_metrics(arm.out)) if "val_loss" in r), math.nan)

    def validate(self, step: int) -> None:
        self.val_loss = self.look().mean
        self.journal.record(step=step, tokens=self._tokens(step), val_loss=self.val_loss)

    def on_step_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        self.began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        hardware.synchronize(self.device)
        self.durations.append(time.perf_counter() - self.began)
        if state.global_step % self.config.validate_every == 0 and state.global_step < self.config.steps:
            self.validate(state.global_step)
        if self.stopped:
            control.should_save = control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **rest: Any) -> None:
        if "loss" not in logs:
            return
        step, loss, pace = state.global_step, logs["loss"], median(self.durations)
        if not math.isfinite(loss):
            raise Failure(f"the training loss is {loss} at step {step}; lower --lr")
        told = {"grad_norm": logs["grad_norm"], "seconds_per_step": pace}
        self.journal.record(step=step, tokens=self._tokens(step), loss=loss, **told)
        self.durations.clear()
        tenth, before = (10 * at // self.config.steps for at in (step, step - args.logging_steps))
        self.journal.progress(step, f"loss {loss:.4f}  held out {self.val_loss:.4f}  {pace:.2f} s/step", tenth > before)

    def on_save(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        self.journal.sync()
        made = Path(args.output_dir, f"checkpoint-{state.global_step}")
        try:
            for path in made.iterdir():
                files.sync(path)
            files.write(made / WHOLE, "")
        except OSError as error:
            raise Failure(f"cannot write {made}: {error.strerror}; free some space and call again") from error

    def _tokens(self, step: int) -> int:
        return step * self.config.rows_per_step * self.config.context


def _newest_whole(checkpoints: Path) -> Path | None:
    """The newest checkpoint that was written to its end; others are removed."""
    found = sorted(checkpoints.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    for path in found:
        if not (path / WHOLE).exists():
            shutil.rmtree(path)
    return next((path for path in reversed(found) if path.exists()), None)
