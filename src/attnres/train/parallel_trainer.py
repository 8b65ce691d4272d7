"""The same loop on many processes: each runs its part of the model on its part of every batch.

What a run computes does not depend on the split: a batch has the same rows, the weights start from the same values, and
loss, gradients and their norm are those of a single process up to rounding. So a run may go on under another split.
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional as F

from ..data.batches import Batches
from ..data.corpus import Corpus, load_corpus
from ..errors import Failure, UsageError
from ..parallel import experts, gradients, mesh, tensor
from ..parallel import fsdp as shard
from ..parallel.agreement import on_first, require_same
from ..parallel.build import build_parts
from ..parallel.pipeline import Layout, Pipeline
from ..run import checkpoint, hardware
from ..run import folder as run_folder
from ..run.config import OF_THE_CORPUS, TrainConfig, flat
from ..version import __version__
from .balance import balance_experts
from .diagnose import non_finite_tensor
from .journal import Journal, SilentJournal
from .optim import build_optimizer
from .shortage import check_size, model_too_large, telling_shortage
from .trainer import Result, Trainer

IGNORED = -100
"""The target of a token that does not count."""

OF_THE_MACHINE = ("device", "cache_dir", "workers")
"""Settings that may differ between the machines of a job."""


def train_in_parallel(config: TrainConfig, resume: bool = False) -> Result:
    """`train` as one of the processes that torchrun started; after a restart of theirs it resumes by itself."""
    config.parallel.check(
        mesh.launched_processes(), config.model, config.batch_size, config.context, config.checkpointing
    )
    if config.compile:
        raise UsageError("compile works in a single process only; leave it out, or leave out parallel")
    device = hardware.find_device(config.device)
    config.model.check_residual()
    # Before the processes wait for each other: one builds the cache, the others wait for its lock as long as it takes.
    corpus = load_corpus(config.data, config.tokenizer, config.cache_dir, text_column=config.text_column)
    config = config.with_vocabulary(corpus.tokenizer.vocab_size)
    with _contact(config.parallel.timeout), mesh.connected(config.parallel, device):
        require_same(_of_the_job(run_folder.settled(config), corpus))
        # an agent of torchrun counts only the restarts that a process of its own node caused
        restarted = _over_all(float(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")), device) > 0
        resume = on_first(lambda: resume or (restarted and (config.out / "config.json").exists()))
        on_first(lambda: run_folder.check_folder(config.out, resume))
        if resume:
            saved = on_first(lambda: run_folder.read_config(config.out))
            config = run_folder.continued(saved, config)
        config = run_folder.settled(config)
        check_size(config)
        with telling_shortage(model_too_large):
            trainer = ParallelTrainer(config, corpus, mesh.build(config.parallel, device), device)
        with run_folder.held(config.out) if trainer.is_first else _nothing():
            if resume:
                trainer.restore(run_folder.newest_checkpoint(config.out))
            on_first(lambda: run_folder.write_config(config))
            on_first(lambda: corpus.tokenizer.save(config.out))
            if blind := _over_all(float(not (config.out / "config.json").exists()), device):
                raise UsageError(
                    f"out must be a folder that all processes see: {blind:.0f} of {config.parallel.world_size} do not "
                    f"find {config.out / 'config.json'}, which the first has written; put --out on a shared disk"
                )
            return trainer.run()


def _of_the_job(config: TrainConfig, corpus: Corpus) -> dict[str, str]:
    """What must be the same in all processes; machines may keep the same text in different places."""
    fields = {name: value for name, value in config.to_dict().items() if name not in (*OF_THE_CORPUS, *OF_THE_MACHINE)}
    data = {"fingerprint": corpus.fingerprint, "train": len(corpus.train), "validation": len(corpus.validation)}
    return flat({**fields, "data": data, "version": __version__, "torch": torch.__version__})


class ParallelTrainer(Trainer):
    """One process's share of a run."""

    def __init__(self, config: TrainConfig, corpus: Corpus, processes: DeviceMesh, device: torch.device) -> None:
        self.config, self.corpus, self.mesh, self.device = config, corpus, processes, device
        self.precision = hardware.find_precision(config.precision, device)
        self.is_first = distributed.get_rank() == 0
        parallel = config.parallel
        self.replicas = parallel.dp * parallel.shard
        self.replica = processes.get_local_rank("dp") * parallel.shard + processes.get_local_rank("shard")
        self.rows = config.batch_size // self.replicas
        stream = (self.rows // parallel.microbatch_count, config.context // parallel.tp, config.model.hidden_size)
        layout = Layout(config.model, parallel, stream, self.precision)
        self.expert_mesh = mesh.of_experts(parallel, processes)
        self.parts = build_parts(
            config.model,
            layout,
            processes,
            device,
            config.context,
            config.seed,
            config.checkpointing,
            expert_mesh=self.expert_mesh,
        )
        for part in self.parts:
            part.precision = self.precision
        self.pipeline = None
        if parallel.pp > 1:
            self.pipeline = Pipeline(
                self.parts, layout, parallel, processes, device, self.rows, config.context, self._mean_loss
            )
        self.optimizer = build_optimizer(self.parts, config.optim)
        self.step = 0
        self.saved_at: Path | None = None
        self.earlier_peak_memory = 0
        self.expert_loads = {}
        self.sent: Counter[str] = Counter()
        self.sent_tokens = 0
        self._batches()
        self._validation()
        self.optimizer.set_learning_rate(0, config.steps)

    @property
    def model(self) -> Any:  # type: ignore[override]
        """The part of the model that this process holds first."""
        return self.parts[0]

    def restore(self, path: Path | None) -> None:
        if path is None:
            return
        stored = run_folder.open_checkpoint(path, self.config)
        state = stored.state()
        self._check_continuation(state, stored.step)
        checkpoint.restore(stored, self.parts, self.optimizer)
        self.step, self.saved_at = stored.step, path
        self.earlier_peak_memory = state["peak_memory_bytes"]

    def _announce(self, journal: Journal) -> tuple[float, float]:
        flops, peak = super()._announce(journal)
        parallel = self.config.parallel
        sizes = {"dp": parallel.dp, "shard": parallel.shard, "tp": parallel.tp, "pp": parallel.pp}
        split = " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1)
        if parallel.ep > 1:
            split += f", experts over {parallel.ep}"
        journal.say(f"{self._label}: {parallel.world_size} processes, {split}")
        return flops, peak * parallel.world_size

    def _journal(self, after: int | None) -> Journal:
        return super()._journal(after) if self.is_first else SilentJournal()

    def _stopped(self, received: list[int]) -> bool:
        # a signal that reaches one process must stop all of them after the same step
        return _over_all(float(bool(received)), self.device) > 0

    def _further_metrics(self) -> dict[str, float]:
        if self.pipeline is None:
            return self.expert_loads
        totals = [_over_all(float(self.sent[direction]), self.device) for direction in ("forward", "backward")]
        hops = self.config.parallel.chunks - 1
        tokens = self.sent_tokens * self.replicas * hops
        self.sent.clear()
        self.sent_tokens = 0
        names = ("forward_bytes_per_token_and_hop", "backward_bytes_per_token_and_hop")
        traffic = {name: total / tokens for name, total in zip(names, totals, strict=True)}
        return {**self.expert_loads, **traffic}

    def _batches(self) -> Batches:
        config = self.config
        return Batches(
            self.corpus.train,
            self.rows,
            config.context,
            config.seed,
            start_step=self.step * config.accumulate,
            num_workers=config.workers,
            rank=self.replica,
            world_size=self.replicas,
            pin_memory=self.device.type == "cuda",
        )

    def _train_step(self, batches: Iterator[tuple[Tensor, Tensor]]) -> tuple[float, float, float]:
        accumulate = self.config.accumulate
        total = 0.0
        for i in range(accumulate):
            inputs, targets = (part.to(self.device, non_blocking=True) for part in next(batches))
            total += self._backward(inputs, targets, i == accumulate - 1)
        for part in self.parts:
            experts.average_gradients(part, self.config.parallel.ep)
        if self.config.parallel.tp > 1:
            for part in self.parts:
                tensor.reduce_replicated_gradients(part, self.mesh["tp"])
        if self.pipeline is not None:
            self.pipeline.sum_tied_gradients()
            for sent in self.pipeline.sent_bytes().values():
                self.sent.update(sent)
            self.sent_tokens += self.rows * self.config.context * accumulate
        loss = _over_all(total, self.device) / (self.replicas * self.config.parallel.tp)
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        copies = [] if self.pipeline is None else self.pipeline.copies
        norm = gradients.clip(parameters, self.config.optim.clip, self.mesh, copies, self.expert_mesh).item()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            what = "the gradient norm" if math.isfinite(loss) else "the loss"
            where = "train in one process to see where it begins"
            raise self._diverged(f"{what} is {norm if math.isfinite(loss) else loss}", where, self.step + 1)
        rate = self.optimizer.set_learning_rate(self.step, self.config.steps)
        self.optimizer.step()
        self.optimizer.zero_grad()
        groups = {name: self.mesh.get_group(name) for name in ("pp", "dp", "shard")}
        self.expert_loads = balance_experts(self.parts, [groups["dp"], groups["shard"]], [groups["pp"]])
        return loss, norm, rate

    def _backward(self, inputs: Tensor, targets: Tensor, is_last: bool) -> float:
        """Adds a batch's gradients; its mean loss, divided by the batches of the step, 0 before the pipeline's end."""
        if self.pipeline is not None:
            return self.pipeline.train(inputs, targets).item()
        (part,) = self.parts
        if isinstance(part, FSDPModule):
            part.set_requires_gradient_sync(is_last)
        loss = self._mean_loss(part(inputs), targets)
        loss.backward()
        return loss.item()

    def _mean_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Over the tokens of this replica's rows, of which the micro-batch is a part, and the batches of a step."""
        tokens = self.rows * self.config.context * self.config.accumulate
        total = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="sum")
        return total / tokens

    @torch.no_grad()
    def _validation_loss(self) -> float:
        total, tokens = 0.0, 0
        for inputs, targets in self._validation():
            tokens += targets.numel()
            inputs = self._own_rows(inputs, 0).to(self.device)
            targets = self._own_rows(targets, IGNORED).to(self.device)
            if self.pipeline is not None:
                loss = self.pipeline.evaluate(inputs, targets)
            else:
                loss = self._mean_loss(self.parts[0](inputs), targets)
            total += loss.item()
        for part in self.parts:
            shard.reshard(part)
        total *= self.rows * self.config.context * self.config.accumulate
        return _over_all(total, self.device) / self.config.parallel.tp / tokens

    def _own_rows(self, tokens: Tensor, filler: int) -> Tensor:
        """This replica's rows of a batch, which may have fewer than all replicas take."""
        own = tokens[self.replica * self.rows :][: self.rows]
        return torch.cat([own, tokens.new_full((self.rows - len(own), tokens.shape[1]), filler)])

    def _save(self, journal: Journal) -> None:
        wrong = next(filter(None, map(non_finite_tensor, self.parts)), None)
        if _over_all(float(wrong is not None), self.device):
            where = f"{wrong} is not" if wrong else "a weight or buffer of another process is not"
            raise self._diverged("the update is not finite", where, self.step)
        state = {
            "config": self.config.to_dict(),
            "corpus": self.corpus.fingerprint,
            "peak_memory_bytes": self._peak_memory(),
        }
        on_first(journal.sync)
        root = self.config.out / "checkpoints"
        self.saved_at = checkpoint.save_run(root, self.step, self.parts, self.optimizer, state, self.config.keep)

    def _peak_memory(self) -> int:
        own = torch.tensor(float(super()._peak_memory()), dtype=torch.float64, device=self.device)
        distributed.all_reduce(own, distributed.ReduceOp.MAX)
        return int(own)


def _over_all(value: float, device: torch.device) -> float:
    """The sum over all processes."""
    total = torch.tensor(value, dtype=torch.float64, device=device)
    distributed.all_reduce(total)
    return total.item()


@contextmanager
def _nothing() -> Iterator[None]:
    yield


@contextmanager
def _contact(timeout: int) -> Iterator[None]:
    """Turns what torch says when another process is gone into a Failure."""
    try:
        yield
    except RuntimeError as error:
        if (lost := _lost_contact(error)) is None:
            raise
        raise Failure(
            f"lost contact with another process of the job, or had no answer from it for {timeout} s "
            f"(--parallel.timeout); look for the first error above, then go on with --resume ({lost})"
        ) from error


def _lost_contact(error: BaseException | None) -> str | None:
    """What torch says of a process that is gone or silent; None if that is not what the error is about."""
    signs = ("onnection closed", "onnection reset", "imed out", "timeout", "roken pipe", "NCCL")
    while error is not None:
        text = str(error).strip()
        if isinstance(error, distributed.DistError) or any(sign in text for sign in signs):
            return re.sub(r"^\[\S+\] ", "", text.partition("\n")[0]).partition(". ")[0][:200]
        error = error.__cause__  # a pipeline stage says only which of its passes failed
    return None
