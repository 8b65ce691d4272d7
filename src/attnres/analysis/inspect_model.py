"""Opening what `attnres inspect` is given: a model folder, its tokenizer, a text; refused before the work starts."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import nn

from .. import json_text, text_file
from .. import residual as residuals
from ..data.tokenizer import Tokenizer
from ..errors import UsageError
from ..files import read
from ..residual import DepthAttention
from ..run.find import root_of
from ..run.opening import open as open_any


class Opened(NamedTuple):
    """model in evaluation mode on its device; residual: the name of its mechanism; context: the longest it is meant
    for, in tokens; start: the token id in front of a text, None where the model has none."""

    model: nn.Module
    residual: str
    context: int
    tokenizer: Tokenizer
    start: int | None


def read_input(text: str | None, data: Path | None) -> tuple[str, str]:
    """(the text, what to call it) of --text or --data. Raises UsageError unless there is one text that is not empty."""
    if (text is None) == (data is None):
        raise UsageError("give either --text TEXT or --data FILE, which the model is to read")
    if data is None:
        name, found = "--text", text or ""
    else:
        name = str(data)
        found = text_file.read_text(data, "--data")
    if not found.strip():
        raise UsageError(f"{name} is empty; give a text of a few words or more")
    return found, name


def check_folder(folder: Path) -> None:
    """Raises UsageError where there is no model in the folder, or no depth attention in it."""
    try:
        values = json_text.parse_object(read(root_of(folder) / "config.json"))
    except OSError as error:
        raise UsageError(
            f"{folder} is no model: its config.json cannot be read ({error.strerror}); give the --out of attnres train "
            "or a folder that save_pretrained wrote"
        ) from error
    except ValueError as error:
        raise UsageError(
            f"{folder} is no model: its config.json cannot be used ({error}); give another folder"
        ) from error
    kind = values.get("model_type")
    if kind in ("kimi_k3", "kimi_linear"):
        from ..hf.kimi_k3.door import read_config  # with all of transformers

        if read_config(folder) is not None:
            return
    shape = values.get("model") if kind is None else values
    name = shape.get("residual") if isinstance(shape, dict) else None
    if not isinstance(name, str):
        what = f"a {kind!r} model" if kind else "no model with a residual connection by name"
        raise UsageError(f"{folder} holds {what}, without depth attention to look at; convert it with attnres convert")
    if not issubclass(residuals.get(name), DepthAttention):
        able = ", ".join(known for known in residuals.names() if issubclass(residuals.get(known), DepthAttention))
        raise UsageError(f"{folder} has the residual {name}, without depth attention to look at; give one with {able}")


def open_model(folder: Path, tokenizer: str | None = None, device: str = "auto") -> Opened:
    """Opens what `attnres.run.open` takes, if it has depth attention.

    Weights are loaded in single precision: in half precision rounding would drown small changes of the loss.
    """
    check_folder(folder)
    if tokenizer is None and not (root_of(folder) / "tokenizer.json").is_file():
        raise UsageError(f"{folder} holds no tokenizer.json; save its tokenizer there, or give --tokenizer")
    model, spelling, kind = open_any(folder, device=device, dtype="float32", tokenizer=tokenizer)
    config = model.config
    if kind == "run":
        start = spelling.end_of_document if spelling.end_of_document < config.vocab_size else None
    else:
        starts = (token for token in (config.bos_token_id, config.eos_token_id) if isinstance(token, int))
        start = next(starts, None)
    return Opened(model, config.residual, getattr(config, "max_position_embeddings", None) or 2048, spelling, start)


def encode(opened: Opened, text: str, name: str, limit: int, cut: bool) -> np.ndarray:
    """Token ids [T] of a text behind the start token, at most `limit` of the text and all that the model reads at once.

    cut: take the first tokens of a longer text instead of refusing it. Raises UsageError for a text that is too long,
    too short, or of tokens that the model does not have.
    """
    begin = [] if opened.start is None else [opened.start]
    most = min(limit, opened.context - len(begin))
    ids = opened.tokenizer.encode(text[: 64 * most] if cut else text).astype(np.int64)
    if len(ids) > most and not cut:
        mend = "raise --tokens" if limit < opened.context - len(begin) else "the model reads no more at once"
        raise UsageError(f"{name} has {len(ids)} tokens and at most {most} are read: shorten it, or {mend}")
    ids = np.concatenate([np.array(begin, np.int64), ids[:most]])
    size = getattr(opened.model, "config").vocab_size  # noqa: B009
    if len(ids) < 2:
        raise UsageError(f"{name} has {len(ids)} tokens, and a loss needs two; give a longer text")
    if ids.max() >= size:
        raise UsageError(f"the tokenizer has token {ids.max()} and the model {size} tokens; give its own --tokenizer")
    return ids
