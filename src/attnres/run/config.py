"""Everything that defines a training run, as one dataclass."""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..errors import UsageError
from ..files import user_path
from ..model import DecoderConfig, preset
from ..parallel.config import ParallelConfig
from .optim_config import OptimConfig

# What may differ between a run and its continuation: none of it changes what is computed. (Another device, or a
# compiled model, may round differently.)
FREE_TO_CHANGE = (
    "out",
    "log_every",
    "checkpoint_every",
    "keep",
    "workers",
    "cache_dir",
    "device",
    "compile",
    "parallel",
    "checkpointing",
)
# Where the text lies and how it is read: the fingerprint of the corpus tells whether it is the same.
OF_THE_CORPUS = ("data", "tokenizer", "text_column")
# How the loss curve is looked at, which it does not depend on.
OF_VALIDATION = ("validate_every", "validation_tokens")
# The learning rate may depend on it: `optim.same_rates` tells whether that of the steps so far does.
LENGTH = ("steps",)


# Far beyond any run; larger numbers overflow in the arithmetic of floats, tensors and generators.
MOST = defaultdict(lambda: 2**53, batch_size=2**31 - 1, context=2**31 - 1, workers=2**16, seed=2**63 - 1)


@dataclass
class RunConfig:
    """Everything about a training run but its model. Raises UsageError for a value outside its range."""

    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer and learning-rate schedule."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """How the run is split over processes, which torchrun starts."""
    data: str = "stdlib"
    """Corpus: "stdlib" (the Python standard library's source), a text, JSON, CSV or Parquet file, a folder, or the name
    of a Hugging Face dataset."""
    tokenizer: str = "bytes"
    """Tokens: "bytes", a tokenizer.json, a Hugging Face name, or "train:VOCAB" to train a BPE of that size."""
    text_column: str = "text"
    """Field that holds the text in JSON, CSV, Parquet and datasets; a.b is the field b of the objects in a."""
    out: Path = Path("runs/train")
    """Folder of the run: config.json, metrics.jsonl, tensorboard/, checkpoints/."""
    steps: int = 180
    """Optimizer steps of the whole run."""
    batch_size: int = 8
    """Sequences in one forward pass, of all processes together."""
    accumulate: int = 1
    """Forward passes in one optimizer step (gradient accumulation)."""
    context: int = 128
    """Tokens in a sequence."""
    seed: int = 0
    """Seed of the initial weights and of the data order."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of autocast; auto: bfloat16 where the hardware multiplies it fast, else float32."""
    device: str = "auto"
    """Device: auto (cuda where there is one, else cpu), cpu, cuda, cuda:1, ..."""
    compile: bool = False
    """Compile the model with torch.compile."""
    checkpointing: bool = False
    """Activation checkpointing: recompute each Transformer block in the backward pass instead of keeping it."""
    validate_every: int = 60
    """Steps between validations; the last step is always validated."""
    validation_tokens: int = 32768
    """Tokens of a validation, always the same ones; fewer if the corpus has fewer."""
    checkpoint_every: int = 100
    """Steps between checkpoints; the last step is always saved."""
    keep: int = 2
    """Checkpoints kept, the newest ones."""
    log_every: int = 10
    """Steps between lines of the log."""
    workers: int = 0
    """Processes that load data."""
    cache_dir: Path | None = None
    """Folder of token caches; the default is ATTNRES_CACHE or the user's cache folder."""

    def __post_init__(self) -> None:
        self.out = user_path(self.out)
        self.cache_dir = None if self.cache_dir is None else user_path(self.cache_dir)
        positive = ("steps", "batch_size", "accumulate", "context", "validate_every", "validation_tokens")
        for name in (*positive, "checkpoint_every", "keep", "log_every"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise UsageError(f"{name} must be a positive whole number; it is {value!r}")
        for name in ("workers", "seed"):
            if getattr(self, name) < 0:
                raise UsageError(f"{name} must be zero or more; it is {getattr(self, name)}")
        for name in (*positive, "checkpoint_every", "keep", "log_every", "workers", "seed"):
            if getattr(self, name) > MOST[name]:
                raise UsageError(f"{name} must be at most {MOST[name]}; it is {getattr(self, name)}")
        if self.validation_tokens < self.context:
            raise UsageError(
                f"validation_tokens must be at least context, {self.context}; it is {self.validation_tokens}"
            )
        if self.precision not in ("auto", "float32", "bfloat16"):
            raise UsageError(f"precision must be auto, float32 or bfloat16; it is {self.precision!r}")

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.accumulate * self.context


@dataclass
class TrainConfig(RunConfig):
    """One training run. Raises UsageError for a value outside its range."""

    model: DecoderConfig = field(default_factory=lambda: preset("tiny"))
    """Shape of the model and its residual connection."""

    def __post_init__(self) -> None:
        super().__post_init__()
        longest = self.model.max_position_embeddings
        if self.context > longest:
            raise UsageError(
                f"context must be at most the model's max_position_embeddings, {longest}; it is {self.context}"
            )

    def to_dict(self) -> dict[str, Any]:
        """JSON values only; the inverse of from_dict."""
        values = dataclasses.asdict(self)
        values["out"] = str(self.out)
        values["cache_dir"] = None if self.cache_dir is None else str(self.cache_dir)
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainConfig:
        """Raises UsageError for a key that is not a field."""
        parts: dict[str, Any] = dict(values)
        for name, part in (("model", DecoderConfig), ("optim", OptimConfig), ("parallel", ParallelConfig)):
            if name in parts:
                parts[name] = _checked(part, parts[name], f"{name}.")
        return _checked(cls, parts, "")

    def with_vocabulary(self, size: int) -> TrainConfig:
        """This run with room for a tokenizer of `size` ids: a smaller vocab_size is raised to it."""
        if self.model.vocab_size >= size:
            return self
        return dataclasses.replace(self, model=dataclasses.replace(self.model, vocab_size=size))

    def with_precision_of(self, other: TrainConfig) -> TrainConfig:
        """This run with the precision of `other` where its own is left to the machine."""
        return self if self.precision != "auto" else dataclasses.replace(self, precision=other.precision)

    def results(self) -> dict[str, Any]:
        """The fields that determine what a run comes to, its validation included."""
        return {name: value for name, value in self.to_dict().items() if name not in FREE_TO_CHANGE}

    def curve(self) -> dict[str, Any]:
        """The fields that determine the loss curve beside the corpus and the length of the run, which are compared with
        a checkpoint; a run is continued only with equal ones."""
        beside = (*OF_THE_CORPUS, *OF_VALIDATION, *LENGTH)
        return {name: value for name, value in self.results().items() if name not in beside}


def check_compatible(saved_config: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Raises UsageError, which names every differing field with both values, unless the configurations are equal.

    Both are nested mappings of JSON values; lists and tuples count as equal.
    """
    saved, own = flat(saved_config), flat(config)
    different = [
        f"{field} ({saved.get(field, 'absent')} in the checkpoint, {own.get(field, 'absent')} now)"
        for field in [*saved, *(field for field in own if field not in saved)]
        if field not in own or field not in saved or saved[field] != own[field]
    ]
    if different:
        raise UsageError(
            f"the checkpoint has another configuration: {', '.join(different)}; "
            "resume with its values or start a new run"
        )


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Dotted field names with their values as JSON text."""
    fields: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            fields.update(flat(value, f"{prefix}{key}."))
        else:
            fields[f"{prefix}{key}"] = json.dumps(value)
    return fields


def _checked(cls: Any, values: dict[str, Any], prefix: str) -> Any:
    known = [f.name for f in dataclasses.fields(cls)]
    for name in values:
        if name not in known:
            raise UsageError(f"the configuration has no field {prefix}{name}; known: {', '.join(known)}")
    return cls(**values)
