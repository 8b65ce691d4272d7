"""The output folder of `attnres train`, as a source of models: its configuration, checkpoint and tokenizer."""

import json
from pathlib import Path
from typing import NamedTuple

from ..errors import Failure, UsageError
from ..files import read
from ..model import DecoderConfig


class Run(NamedTuple):
    """A training run on disk.

    folder: the run's output; checkpoint: the folder of weights in it; config: the model's shape; end_of_document: id of
    the token that ends a document, or None where the run has no tokenizer.
    """

    folder: Path
    checkpoint: Path
    config: DecoderConfig
    end_of_document: int | None


def is_run(folder: str | Path) -> bool:
    """Whether `folder` is the output of a training run, or a checkpoint in it, and not a Hugging Face model."""
    values = _settings(_root(Path(folder)))
    return "model_type" not in values and isinstance(values.get("model"), dict)


def open_run(folder: str | Path) -> Run:
    """The run in `folder`, with its newest whole checkpoint; or the run around a checkpoint folder, with that one.

    A checkpoint of many processes gets a file with the whole model first. Raises UsageError where there is no run or no
    checkpoint, Failure where that file cannot be written.
    """
    from ..train import checkpoint as checkpoints
    from ..train.tokenizer import load_tokenizer_from

    folder = Path(folder)
    root = _root(folder)
    if not is_run(folder):
        raise UsageError(f"{folder} is not a training run; give the --out of attnres train or a checkpoint in it")
    chosen: Path | None = folder if folder != root else checkpoints.latest(root / "checkpoints")
    if chosen is not None and (chosen / checkpoints.METADATA).exists() and not (chosen / checkpoints.MODEL).exists():
        from ..train import sharded

        sharded.export(chosen)
    if chosen is None or not (chosen / checkpoints.MODEL).is_file():
        raise UsageError(f"{folder} holds no whole checkpoint; give a run that has saved one")
    has_tokenizer = (root / "tokenizer.json").is_file()
    return Run(
        root,
        chosen,
        DecoderConfig.from_dict(_settings(root)["model"]),
        load_tokenizer_from(root).end_of_document if has_tokenizer else None,
    )


def _root(folder: Path) -> Path:
    return folder.parent.parent if folder.parent.name == "checkpoints" else folder


def _settings(root: Path) -> dict:
    try:
        values = json.loads(read(root / "config.json"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise Failure(f"{root / 'config.json'} cannot be read: {error}") from error
    return values if isinstance(values, dict) else {}
