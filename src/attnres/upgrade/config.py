"""Everything that defines an upgrade, as one dataclass, and its place in the folder."""

from __future__ import annotations

import dataclasses
import inspect
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .. import files, json_text
from .. import residual as residuals
from ..errors import Failure, UsageError, check_counts, check_each_once
from ..files import user_path

PLAIN = "plain"
"""The arm that stays as it was."""
FULL_RATE, ADAPTER_RATE = 3e-5, 1e-3
FREE_TO_CHANGE = ("out", "device", "checkpoint_every")
FILE = "upgrade.json"


@dataclass
class UpgradeConfig:
    """One upgrade. Raises UsageError for a value outside its range."""

    model: str
    """Folder of a transformers model, a GGUF file (whose weights are dequantised) or a name on the Hub."""
    data: str
    """Corpus to train on: texts as `attnres train` takes them, or records with conversations in `messages`."""
    out: Path = Path("runs/upgrade")
    """Folder of everything: upgraded/, results.json, report.html and the runs."""
    residual: tuple[str, ...] = ("block_attnres",)
    """What the model is converted to, block_attnres or full_attnres; several separated by commas. Options may stand
    behind a name, as in block_attnres:reads=mlp."""
    num_blocks: int | None = None
    """Blocks of Block AttnRes; the default is 8, or fewer in a shallow model."""
    block_size: int | None = None
    """Layers in a block instead of num_blocks; every attention and every MLP is one layer."""
    train: Literal["all", "lora", "residual"] = "all"
    """What is trained: all weights; LoRA adapters on all linear layers, and the residual connection beside them; or the
    residual connection alone."""
    lr: float | None = None
    """Highest learning rate of weights or adapters; the default is 3e-5 for all, 1e-3 for lora."""
    query_lr: float | None = None
    """Highest learning rate of the residual connection; the default is lr for all, else 3e-5."""
    lora_rank: int = 8
    """Rank of the adapters."""
    steps: int = 200
    """Optimizer steps of each run."""
    batch_size: int = 8
    """Rows in one forward pass."""
    accumulate: int = 1
    """Forward passes in one optimizer step (gradient accumulation)."""
    context: int = 512
    """Tokens in a row."""
    warmup_steps: int | None = None
    """Steps of rising learning rate, before it falls as a cosine; the default is a twentieth of the steps."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of the data order, separated by commas; several show mean and spread."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of autocast; auto: bfloat16 where the hardware multiplies it fast, else float32. Weights are float32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device: auto (cuda where there is one, else cpu), cpu or cuda."""
    text_column: str = "text"
    """Field that holds the text in JSON, CSV, Parquet and datasets; a.b is the field b of the objects in a."""
    validate_every: int | None = None
    """Steps between held-out losses; the default is a fifth of the steps."""
    validation_tokens: int = 65536
    """Tokens of a held-out loss, always the same ones; fewer if there are fewer."""
    checkpoint_every: int | None = None
    """Steps between checkpoints; the default is a fifth of the steps."""

    def __post_init__(self) -> None:
        self.out, self.residual, self.seeds = user_path(self.out), tuple(self.residual), tuple(self.seeds)
        for name in ("model", "data"):
            if (value := getattr(self, name)) not in ("", "stdlib") and user_path(value).exists():
                setattr(self, name, str(user_path(value).resolve()))
        fifth = max(1, self.steps // 5) if isinstance(self.steps, int) else 1
        self.validate_every = fifth if self.validate_every is None else self.validate_every
        self.checkpoint_every = fifth if self.checkpoint_every is None else self.checkpoint_every
        self.warmup_steps = self.steps // 20 if self.warmup_steps is None else self.warmup_steps
        names = ("lora_rank", "steps", "batch_size", "accumulate", "validate_every", "checkpoint_every")
        check_counts(**{name: getattr(self, name) for name in names})
        check_counts(0, warmup_steps=self.warmup_steps)
        check_counts(2, context=self.context)
        check_counts(2 * self.context, validation_tokens=self.validation_tokens)
        choices = {"train": ("all", "lora", "residual"), "precision": ("auto", "float32", "bfloat16")}
        choices["device"] = ("auto", "cpu", "cuda")
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise UsageError(f"{name} must be one of {', '.join(known)}; it is {getattr(self, name)!r}")
        if self.train == "residual" and self.lr is not None:
            raise UsageError("lr is for weights, of which train='residual' trains none; give query_lr instead")
        for name in ("lr", "query_lr"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise UsageError(f"{name} must be a positive number; it is {value}")
        check_each_once(seeds=self.seeds, residual=self.residual)
        check_counts(0, **{f"seeds[{i}]": seed for i, seed in enumerate(self.seeds)})
        converted = [self.conversion(entry)[1] for entry in self.residual]
        for name in ("num_blocks", "block_size"):
            if getattr(self, name) is not None and not any(name in options for options in converted):
                raise UsageError(f"{name} is an option of none of {', '.join(self.residual)}, or stands behind it")

    @property
    def rate(self) -> float:
        """Of weights or adapters."""
        return self.lr or (ADAPTER_RATE if self.train == "lora" else FULL_RATE)

    @property
    def query_rate(self) -> float:
        """Of the residual connection."""
        return self.query_lr or (self.rate if self.train == "all" else FULL_RATE)

    @property
    def rows_per_step(self) -> int:
        return self.batch_size * self.accumulate

    @property
    def arms(self) -> tuple[str, ...]:
        return (PLAIN, *self.residual)

    def conversion(self, entry: str) -> tuple[str, dict[str, Any]]:
        """(residual connection, its options) of one of `residual`."""
        name, options = residuals.named(entry)
        sizes = {"num_blocks": self.num_blocks, "block_size": self.block_size}
        known = inspect.signature(residuals.get(name).__init__).parameters
        if not options.keys() & sizes.keys():
            options |= {size: value for size, value in sizes.items() if value is not None and size in known}
        return name, options

    def to_dict(self) -> dict[str, Any]:
        """JSON values only."""
        return json_text.parse_object(json.dumps(dataclasses.asdict(self), default=str))


@contextmanager
def claimed(config: UpgradeConfig) -> Iterator[None]:
    """Makes the folder `out` that of this upgrade, unless it has been; an error within then leaves it empty again, so
    that a mended command can have it. Raises UsageError if it is something else's."""
    is_new = _claim(config)
    try:
        yield
    except (UsageError, Failure):
        if is_new:
            for path in config.out.iterdir():
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink()
        raise


def _claim(config: UpgradeConfig) -> bool:
    """Whether the folder was empty before."""
    file = config.out / FILE
    own = {name: value for name, value in config.to_dict().items() if name not in FREE_TO_CHANGE}
    if file.exists():
        try:
            saved = json_text.parse_object(files.read(file))
        except (OSError, ValueError) as error:
            raise Failure(f"{file} cannot be read: {error}; choose another --out") from error
        for name in (name for name in {**saved, **own} if saved.get(name) != own.get(name)):
            raise UsageError(
                f"out holds another upgrade: {config.out} has {name} {saved.get(name)!r}, and this command has "
                f"{own.get(name)!r}; choose another --out"
            )
        return False
    if others := [path.name for path in config.out.iterdir() if path.name != f"{FILE}.tmp"]:
        raise UsageError(f"out must be a new folder, or that of this upgrade; {config.out} has {others[0]} in it")
    try:
        files.write(file, json.dumps(own, indent=1) + "\n")
    except OSError as error:
        raise Failure(f"cannot write {file}: {error.strerror}; choose another --out") from error
    return True
