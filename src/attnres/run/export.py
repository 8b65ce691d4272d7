"""The output folder of `attnres train`, as a source of models: its configuration, checkpoint and tokenizer."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from .. import json_text
from ..errors import Failure, UsageError
from ..files import read
from ..model import DecoderConfig


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
        from . import checkpoint as checkpoints
        from .stored import MODEL

        if (self.checkpoint / MODEL).exists():
            yield self.checkpoint
            return
        with tempfile.TemporaryDirectory(prefix="attnres-run-") as place:
            checkpoints.export(self.checkpoint, Path(place))
            yield Path(place)


def is_run(folder: str | Path) -> bool:
    """Whether `folder` is the output of a training run, or a checkpoint in it, and not a Hugging Face model."""
    values = _settings(root_of(folder))
    return "model_type" not in values and isinstance(values.get("model"), dict)


def open_run(folder: str | Path) -> Run:
    """The run in `folder`, with its newest whole checkpoint; or the run around a checkpoint folder, with that one.

    Nothing is written. Raises UsageError where there is no run or no checkpoint.
    """
    from ..data.tokenizer import load_tokenizer_from
    from . import checkpoint as checkpoints

    folder = Path(folder)
    root = root_of(folder)
    if not is_run(folder):
        raise UsageError(f"{folder} is not a training run; give the --out of attnres train or a checkpoint in it")
    chosen: Path | None = folder if folder != root else checkpoints.latest(root / "checkpoints")
    if chosen is None or not checkpoints.is_checkpoint(chosen):
        raise UsageError(f"{folder} holds no whole checkpoint; give a run that has saved one")
    has_tokenizer = (root / "tokenizer.json").is_file()
    return Run(
        root,
        chosen,
        DecoderConfig.from_dict(_settings(root)["model"]),
        load_tokenizer_from(root).end_of_document if has_tokenizer else None,
    )


def root_of(folder: str | Path) -> Path:
    """The run that a checkpoint folder belongs to; any other folder as it is, wherever it lies."""
    folder = Path(folder)
    inside = folder.parent.name == "checkpoints" and not (folder / "config.json").exists()
    return folder.parent.parent if inside else folder


def _settings(root: Path) -> dict:
    try:
        values = json_text.parse(read(root / "config.json"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise Failure(f"{root / 'config.json'} cannot be read: {error}") from error
    return values if isinstance(values, dict) else {}
