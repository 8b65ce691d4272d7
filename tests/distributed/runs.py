"""Runs of `train`, in a single process and inside the processes of a World, and what is left of them."""

from __future__ import annotations

import io
import json
import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from attnres.cli import main
from attnres.data.corpus import load_corpus
from attnres.errors import Failure, UsageError
from attnres.model import DecoderConfig, preset
from attnres.parallel import build, mesh, pipeline
from attnres.parallel.config import ParallelConfig
from attnres.parallel.weights import held_tensors
from attnres.run import checkpoint, hardware
from attnres.run.config import TrainConfig
from attnres.train.journal import Journal
from attnres.train.loop import Trainer
from attnres.train.optim import OptimConfig
from attnres.train.trainer import train

from .agreement import whole

RUN: dict[str, Any] = {
    "steps": 3,
    "batch_size": 8,
    "context": 16,
    "validate_every": 2,
    "validation_tokens": 160,  # ten rows: the second batch has two of them
    "checkpoint_every": 100,
    "log_every": 1,
    "device": "cpu",
    "precision": "float32",
}
MODEL: dict[str, Any] = {
    "vocab_size": 261,  # no number of processes divides it
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "residual": "block_attnres",
    "residual_options": {"block_size": 3},
}
EXPERTS = {**asdict(preset("kimi-linear-tiny")), "vocab_size": 261}


def settings(
    corpus: Path,
    out: Path,
    parallel: dict[str, Any] | None = None,
    model: dict[str, Any] | None = None,
    optim: dict[str, Any] | None = None,
    **run: Any,
) -> TrainConfig:
    """What differs from RUN and MODEL."""
    return TrainConfig(
        data=str(corpus),
        out=out,
        cache_dir=corpus.parent / "cache",
        model=DecoderConfig(**{**MODEL, **(model or {})}),
        parallel=ParallelConfig(**{"timeout": 60, **(parallel or {})}),
        optim=OptimConfig(**{"warmup_steps": 1, **(optim or {})}),
        **{**RUN, **run},
    )


def prepare(config: TrainConfig) -> None:
    """Keeps runs quick and quiet, and their processes together after a run."""
    hardware.peak_flops = lambda device, precision: 1e11  # measuring it takes as long as the run
    Journal.say = lambda self, text: None
    if config.parallel.world_size > 1 and not torch.distributed.is_initialized():
        mesh.build(ParallelConfig(dp=config.parallel.world_size, timeout=60), torch.device("cpu"))


def run(config: TrainConfig, resume: bool = False, stop: tuple[int, int] | None = None) -> tuple[bool, int, float]:
    """Whether the run finished, its steps and its validation loss.

    stop: (rank, step), the one process that gets a SIGTERM in that step.
    """
    return _run(config, resume, stop)


def run_exactly(config: TrainConfig) -> tuple[bool, int, float]:
    """`run` in double precision, the loss and Muon's orthogonalisation too: rounding turns no token to another expert.

    In bfloat16 it does, on some processors, after which no tolerance tells a fault from rounding.
    """
    with pytest.MonkeyPatch.context() as patch:
        for name in ("float", "bfloat16"):
            patch.setattr(torch.Tensor, name, torch.Tensor.double)
        layout, build_parts = pipeline.Layout, build.build_parts
        patch.setattr(pipeline, "Layout", lambda *shape: layout(*shape[:-1], torch.float64))
        patch.setattr(build, "build_parts", partial(build_parts, dtype=torch.float64))
        torch.set_default_dtype(torch.float64)
        try:
            return _run(config)
        finally:
            torch.set_default_dtype(torch.float32)


def _run(config: TrainConfig, resume: bool = False, stop: tuple[int, int] | None = None) -> tuple[bool, int, float]:
    prepare(config)
    take_step = Trainer._train_step

    def stopped(self: Trainer, *args: Any) -> Any:
        if stop == (int(os.environ.get("RANK", "0")), self.step + 1):
            os.kill(os.getpid(), signal.SIGTERM)
        return take_step(self, *args)

    Trainer._train_step = stopped
    try:
        result = train(config, resume)
    finally:
        Trainer._train_step = take_step
    return result.finished, result.step, result.val_loss


def restored(config: TrainConfig, path: Path) -> tuple[list[str], dict[str, list[float]]]:
    """What of a checkpoint this process has not got, bit for bit, when it goes on from it; its experts' biases."""
    prepare(config)
    corpus = load_corpus(config.data, config.tokenizer, config.cache_dir)
    trainer = Trainer(config, corpus)
    trainer.restore(path)
    saved = checkpoint.load(path)
    own = {name: tensor for part in trainer.share.parts for name, tensor in held_tensors(part).items()}
    wrong = [
        name
        for name, tensor in saved.model_tensors.items()
        if not name.startswith("residual.") and not torch.equal(whole(own[name]), tensor)  # which are held by rows
    ]
    states = trainer.optimizer.state_dict()
    for owner, parameters in saved.optimizer_state.items():
        for name, saved_state in parameters.items():
            for key, tensor in saved_state.items() if not name.startswith("residual.") else ():
                if not torch.equal(whole(states[owner][name][key]), tensor):
                    wrong.append(f"{owner}/{name}/{key}")
    return wrong, {name: bias.tolist() for name, bias in own.items() if name.endswith("correction_bias")}


def trained_biases(config: TrainConfig) -> dict[str, list[float]]:
    """The biases of this process's experts after a run."""
    prepare(config)
    buffers = train(config).model.named_buffers()
    return {name: bias.tolist() for name, bias in buffers if name.endswith("correction_bias")}


def failing(config: TrainConfig, resume: bool = False, full: int | None = None) -> tuple[str, str]:
    """What the run fails with, and its sentence. full: the rank that may write no file of more than 20 kB."""
    try:
        with largest_file(20_000) if full == int(os.environ["RANK"]) else nullcontext():
            run(config, resume)
    except (Failure, UsageError) as error:
        return type(error).__name__, str(error)
    raise AssertionError("it did not fail")


def restarted(config: TrainConfig, rank: int) -> tuple[bool, int, float]:
    """`run` after a restart that torchrun has told one process of only."""
    os.environ["TORCHELASTIC_RESTART_COUNT"] = str(int(os.environ["RANK"] == str(rank)))
    try:
        return run(config)
    finally:
        del os.environ["TORCHELASTIC_RESTART_COUNT"]


def command(argv: list[str]) -> tuple[int, str]:
    """Exit status and stderr of the command line."""
    with redirect_stderr(io.StringIO()) as err:
        return main(argv), err.getvalue()


def disagreeing(argv: list[str], own: list[str], rank: int) -> tuple[int, str]:
    """`command`, with further flags in one process."""
    return command([*argv, *own] if os.environ["RANK"] == str(rank) else argv)


def elsewhere(config: TrainConfig, folder: Path, rank: int) -> tuple[str, str]:
    """`failing`, with `rank` in another working directory than the rest."""
    own = folder / str(int(os.environ["RANK"]) == rank)
    own.mkdir(exist_ok=True)
    before = os.getcwd()
    os.chdir(own)
    try:
        return failing(config)
    finally:
        os.chdir(before)


def killed_in_save(config: TrainConfig, rank: int, save: int) -> tuple[str, str]:
    """`failing`, as `rank` dies in the checkpoint number `save`: rank 0 when only state.json is missing."""
    name = "_write_manifest" if rank == 0 else "_write"
    right, calls = getattr(checkpoint, name), []

    def killed(*args: Any) -> Any:
        calls.append(name)
        if len(calls) == save and int(os.environ["RANK"]) == rank:
            os.kill(os.getpid(), signal.SIGKILL)
        return right(*args)

    setattr(checkpoint, name, killed)
    try:
        return failing(config)
    finally:
        setattr(checkpoint, name, right)


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """The system lets no file of this process grow beyond `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def curve(out: Path) -> dict[str, list[float]]:
    """The numbers that a run recorded, by name, oldest first, but for its speed."""
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    names = ("step", "loss", "lr", "grad_norm", "val_loss", "max_load", "min_load")
    return {name: [record[name] for record in records if name in record] for name in names}
