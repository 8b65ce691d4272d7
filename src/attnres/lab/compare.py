"""Residual connections side by side: equal initial weights for all that they share, equal data, equal schedule."""

from __future__ import annotations

import dataclasses
import datetime
import json
import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch

from .. import residual as residuals
from ..analysis.figures import write_figures
from ..analysis.probe import probe
from ..analysis.report import write_report
from ..analysis.style import apply_style
from ..errors import Failure, UsageError
from ..model import DecoderConfig, DecoderShape
from ..train import hardware
from ..train.checkpoint import check_compatible
from ..train.config import TrainConfig
from ..train.data import load_corpus, validation_batches
from ..train.journal import read_metrics
from ..train.run_folder import read_config
from ..train.stopping import starting_deaf_processes
from ..train.trainer import train
from ..version import __version__

PROBE_BATCHES = 4


@dataclass
class CompareConfig:
    """A comparison: the same training run for several residual connections and seeds."""

    residuals: tuple[str, ...] = ("prenorm", "block_attnres", "full_attnres")
    """Residual connections to train; the first is the baseline."""
    seeds: tuple[int, ...] = (0,)
    """Seeds; each repeats every run with other initial weights and another data order."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """What every run shares; its residual connection and seed are set by the comparison."""
    residual_options: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Options of a residual connection, by its name."""

    def __post_init__(self) -> None:
        self.residuals, self.seeds = tuple(self.residuals), tuple(self.seeds)
        for name in ("residuals", "seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) != len(values):
                raise UsageError(f"{name} must name at least one, each once; it is {', '.join(map(str, values))!r}")
        for name in self.residuals:
            residuals.get(name)

    def runs(self) -> list[TrainConfig]:
        """One configuration for each seed and residual connection, seeds outermost."""
        shape = {f.name: getattr(self.train.model, f.name) for f in dataclasses.fields(DecoderShape)}
        return [
            dataclasses.replace(
                self.train,
                model=DecoderConfig(**shape, residual=name, residual_options=self.residual_options.get(name, {})),
                seed=seed,
                out=self.train.out / "runs" / f"{name}-seed{seed}",
            )
            for seed in self.seeds
            for name in self.residuals
        ]


def compare(config: CompareConfig, command: str = "") -> dict[str, Any]:
    """Trains every run, each in a process of its own, and writes results.json, figures/ and report.html under
    train.out.

    A run that is finished is not repeated, one that was cut off goes on from its checkpoint: calling again after a kill
    continues the comparison. Returns the contents of results.json. Raises UsageError for bad input and Failure where a
    run fails.
    """
    out = config.train.out
    with apply_style():
        pass  # refuses a missing matplotlib, and the loop bad options, before the first run
    for run in config.runs():
        run.model.build_residual()
    corpus = load_corpus(
        config.train.data, config.train.tokenizer, config.train.cache_dir, text_column=config.train.text_column
    )
    config = dataclasses.replace(config, train=config.train.with_vocabulary(corpus.tokenizer.vocab_size))
    runs = config.runs()
    _check_resumable(runs)
    finished = [_finished_run(run, f"[{i}/{len(runs)}]") for i, run in enumerate(runs, 1)]
    device = hardware.find_device(config.train.device)
    results = {
        "command": command,
        "version": __version__,
        "commit": _commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": hardware.describe(device),
        "dtype": str(hardware.find_precision(config.train.precision, device)).removeprefix("torch."),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "corpus": {
            "name": corpus.name,
            "train_tokens": len(corpus.train),
            "val_tokens": len(corpus.validation),
        },
        "model": runs[0].model.to_dict(),
        "train": config.train.to_dict(),
        "baseline": config.residuals[0],
        "runs": finished,
        "summary": summarise(finished, config.residuals),
    }
    _write_json(out / "results.json", results)
    write_figures(results, out / "figures")
    write_report(results, out)
    return results


def summarise(runs: Sequence[dict[str, Any]], names: Sequence[str]) -> list[dict[str, Any]]:
    """One row a residual connection; differences and ratios are to the first one, paired by seed, then averaged."""
    by_name = {name: {run["seed"]: run for run in runs if run["residual"] == name} for name in names}
    baseline = by_name[names[0]]
    rows = []
    for name, own in by_name.items():
        losses = [run["val_loss"] for run in own.values()]
        differences = [run["val_loss"] - baseline[seed]["val_loss"] for seed, run in own.items()]
        ratios = [run["tokens_per_second"] / baseline[seed]["tokens_per_second"] for seed, run in own.items()]
        first = next(iter(own.values()))
        rows.append(
            {
                "residual": name,
                "seeds": list(own),
                "parameters": first["parameters"],
                "tokens": first["tokens"],
                "val_loss": mean(losses),
                "val_loss_spread": max(losses) - min(losses) if len(losses) > 1 else None,
                "difference": mean(differences),
                "difference_spread": max(differences) - min(differences) if len(differences) > 1 else None,
                "throughput_ratio": mean(ratios),
                "peak_memory_bytes": max(run["peak_memory_bytes"] for run in own.values()),
            }
        )
    return rows


def _check_resumable(runs: Sequence[TrainConfig]) -> None:
    for run in runs:
        if (run.out / "config.json").exists():
            try:
                check_compatible(read_config(run.out).curve(), run.curve())
            except UsageError as error:
                raise UsageError(f"out holds another comparison, choose another --out: in {run.out} {error}") from error


def _finished_run(config: TrainConfig, label: str) -> dict[str, Any]:
    """The result of a run, made in a fresh process, so that its peak memory and speed are its own."""
    file = config.out / "result.json"
    if file.exists():
        return json.loads(file.read_text())
    print(f"{label} {config.model.residual}, seed {config.seed}", file=sys.stderr, flush=True)
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_result, args=(config, sender))
    with starting_deaf_processes(signal.SIGINT):  # on Ctrl-C this process tells it to stop
        # threads that spin at barriers crawl as soon as another program wants a core
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        process.start()
    sender.close()
    try:
        answer = receiver.recv()
        process.join()
    except EOFError:
        process.join()
        answer = Failure(f"the run in {config.out} ended with exit code {process.exitcode}; call again to continue")
    except BaseException:
        process.terminate()  # it saves a checkpoint and ends
        try:
            process.join()
        finally:
            process.kill()  # a second Ctrl-C does not wait for that
        print(f"stopped in {config.out}; call again to continue", file=sys.stderr)
        raise
    if isinstance(answer, Exception):
        raise answer
    _write_json(file, answer)
    return answer


def _send_result(config: TrainConfig, sender: Any) -> None:
    threading.Thread(target=_follow_parent, daemon=True).start()
    try:
        answer: Any = _train_and_probe(config)
    except Exception as error:
        error.add_note(traceback.format_exc())
        answer = error
    with suppress(BrokenPipeError):  # nobody is left to hear it
        sender.send(answer)


def _follow_parent() -> None:
    """Ends this process, checkpoint and all, when the comparison that started it is gone."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)


def _train_and_probe(config: TrainConfig) -> dict[str, Any]:
    outcome = train(config, resume=(config.out / "config.json").exists())
    if not outcome.finished:
        raise Failure(f"the run in {config.out} was stopped at step {outcome.step}; call again to continue")
    device = hardware.find_device(config.device)
    with hardware.autocast(device, hardware.find_precision(config.precision, device)):
        inside = probe(outcome.model, _probe_batches(config))
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


def _probe_batches(config: TrainConfig) -> Any:
    corpus = load_corpus(config.data, config.tokenizer, config.cache_dir, text_column=config.text_column)
    tokens = PROBE_BATCHES * config.batch_size * config.context
    return validation_batches(corpus.validation, config.batch_size, config.context, tokens)


def _columns(records: list[dict[str, Any]], value: str) -> dict[str, list[Any]]:
    rows = [record for record in records if value in record]
    return {name: [row[name] for row in rows] for name in ("step", "tokens", value)}


def _write_json(path: Path, value: Any) -> None:
    scratch = path.with_name(path.name + ".tmp")
    try:
        scratch.write_text(json.dumps(value, indent=1) + "\n")
        os.replace(scratch, path)
    except OSError as error:
        with suppress(OSError):
            scratch.unlink(missing_ok=True)
        raise Failure(f"cannot write {path}: {error.strerror}; free some space and call again") from error


def _commit() -> str | None:
    folder = Path(__file__).parent
    try:
        git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=folder, capture_output=True, text=True)
    except OSError:
        return None
    return git.stdout.strip() or None
