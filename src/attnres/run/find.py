"""Where the output of `attnres train` lies on disk: its shape, the checkpoint to take, the weights in it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from .. import json_text
from ..data.tokenizer import load_tokenizer_from
from ..errors import Failure, UsageError
from ..files import read
from ..model import DecoderConfig
from . import checkpoint
from .stored import MODEL


def is_run(folder: str | Path) -> bool:
    """Whether `folder` is the output of a training run, or a checkpoint in it, and not a Hugging Face model."""
    values = _settings(root_of(folder))
    return "model_type" not in values and isinstance(values.get("model"), dict)


def root_of(folder: str | Path) -> Path:
    """The run that a checkpoint folder belongs to; any other folder as it is, wherever it lies."""
    folder = Path(folder)
    inside = folder.parent.name == "checkpoints" and not (folder / "config.json").exists()
    return folder.parent.parent if inside else folder


class Run(NamedTuple):
    """A training run on disk.

    folder: the run's output; checkpoint: the folder of the chosen step in it; config: the model's shape;
    end_of_document: id of the token that ends a document, or None where the run has no tokenizer.
    """

    folder: Path
    checkpoint: Path
    config: DecoderConfig
    end_of_document: int | None

    @contextmanager
    def weights(self) -> Iterator[Path]:
        """A folder with the whole model as model.safetensors: the checkpoint, or a temporary one for the parts of many
        processes. Raises Failure where that cannot be written."""
        if (self.checkpoint / MODEL).exists():
            yield self.checkpoint
            return
        with tempfile.TemporaryDirectory(prefix="attnres-run-") as place:
            checkpoint.export(self.checkpoint, Path(place))
            yield Path(place)


def find_run(folder: str | Path) -> Run:
    """The run in `folder`, with its newest whole checkpoint; or the run around a checkpoint folder, with that one.

    Nothing is written. Raises UsageError where there is no run or no checkpoint.
    """
    folder = Path(folder)
    root = root_of(folder)
    if not is_run(folder):
        raise UsageError(f"{folder} is not a training run; give the --out of attnres train or a checkpoint in it")
    chosen = folder if folder != root else checkpoint.latest(root / "checkpoints")
    if chosen is None or not checkpoint.is_checkpoint(chosen):
        raise UsageError(f"{folder} holds no whole checkpoint; give a run that has saved one")
    has_tokenizer = (root / "tokenizer.json").is_file()
    return Run(
        root,
        chosen,
        DecoderConfig.from_dict(_settings(root)["model"]),
        load_tokenizer_from(root).end_of_document if has_tokenizer else None,
    )


def _settings(root: Path) -> dict[str, Any]:
    try:
        values = json_text.parse(read(root / "config.json"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise Failure(f"{root / 'config.json'} cannot be read: {error}") from error
    return values if isinstance(values, dict) else {}
