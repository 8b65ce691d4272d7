"""A trained model in, a file or folder for other programs out: what `attnres export` runs."""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from .. import json_text
from ..errors import Failure, UsageError
from ..files import read, sync
from ..model.decoder import backbone_of
from ..run import opening
from ..run.find import root_of
from . import gguf_file, kimi_k3
from .fit import fit
from .parts import parts
from .vocabulary import vocabulary

FORMATS = ("kimi-k3", "gguf")
_TAKEN = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges*",
    "chat_template*",
    "LICENSE*",
)
_log = logging.getLogger("attnres")


def export_model(
    source: str | Path,
    out: str | Path,
    to: str,
    *,
    outtype: str | None = None,
    report: Callable[[str], None] = _log.info,
) -> dict[str, Any]:
    """Writes a trained model in another program's layout.

    Args:
        source: the output of `attnres train`, a checkpoint in it, or a native Hugging Face folder.
        out: what is written, a folder for kimi-k3 and a file for gguf. It must not exist, and appears whole or not at
            all; a process that is killed leaves something of another name beside it.
        to: "kimi-k3", Kimi K3's checkpoint layout, or "gguf", llama.cpp's file.
        outtype: type of the matrices of a GGUF file: "f32", "f16" (the default), "bf16" or "q8_0". A folder has the
            model's own dtype.
        report: called with lines of progress.

    Returns {"source", "destination", "to", "parameters", "layers" (Kimi K3's), "block_size" (in these), "bytes"}.

    Raises UsageError for what is no such model, for a model that the layout has no words for and for an `out` that
    exists; Failure for a damaged model and where writing fails.
    """
    source, destination = Path(source), Path(out)
    if to not in FORMATS:
        raise UsageError(f"to must be one of {', '.join(FORMATS)}; it is {to!r}")
    outtype = _outtype(outtype, to)
    if os.path.lexists(destination):
        raise UsageError(f"{destination} exists already; name what does not, or remove it")
    if to == "gguf":
        gguf_file.library()
    opened = opening.open(source, device="cpu")
    backbone = backbone_of(opened.model)
    if backbone is None:
        raise UsageError(
            f"{source} is a {opened.kind} model, whose layers are not Kimi K3's; export a run of attnres train, or a "
            "native model of kda and mla layers"
        )
    config = backbone.config
    block_size = fit(config, backbone.residual)
    of_source = partial(parts, opened.model, backbone)
    progress = _Progress(config.num_hidden_layers, report)
    folder = root_of(source)
    tokens = _token_ids(opened)
    if to == "kimi-k3":
        dtype = str(backbone.embed_tokens.weight.dtype).removeprefix("torch.")
        with _whole(destination) as scratch:
            scratch.mkdir()
            kimi_k3.write(scratch, of_source(), config, block_size, tokens, dtype, progress.at)
            _take_along(folder, scratch, tokens)
    else:
        words = vocabulary(opened.tokenizer, _special(tokens), _chat_template(folder))
        gguf_file.check(config)
        with _whole(destination) as scratch:
            gguf_file.write(scratch, of_source, config, block_size, words, destination.stem, outtype, progress.at)
    return {
        "source": str(source),
        "destination": str(destination),
        "to": to,
        "parameters": config.parameter_counts()["total"],
        "layers": config.num_hidden_layers,
        "block_size": block_size,
        "bytes": sum(file.stat().st_size for file in (destination, *destination.glob("*")) if file.is_file()),
    }


def _outtype(given: str | None, to: str) -> str:
    if given is not None and to != "gguf":
        raise UsageError(f"outtype is of GGUF files; leave it out with {to}, whose weights keep the model's dtype")
    if given is not None and given not in gguf_file.OUTTYPES:
        raise UsageError(f"outtype must be one of {', '.join(gguf_file.OUTTYPES)}; it is {given!r}")
    return given or "f16"


class _Progress:
    """Says which layer is being written, every few seconds."""

    def __init__(self, layers: int, report: Callable[[str], None]) -> None:
        self.layers, self.report, self.said = layers, report, time.monotonic()

    def at(self, layer: int | None) -> None:
        if layer is not None and time.monotonic() - self.said >= 2:
            self.report(f"writing layer {layer + 1} of {self.layers}")
            self.said = time.monotonic()


@contextmanager
def _whole(destination: Path) -> Iterator[Path]:
    """A name beside `destination` for what is to take its name at the end of the block, synced, or vanish."""
    scratch = destination.with_name(f".{destination.name}.{os.getpid()}.partial")
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        yield scratch
        for path in (*scratch.glob("*"), scratch):
            sync(path)
        if os.path.lexists(destination):
            raise UsageError(f"{destination} has come to exist meanwhile; name what does not, or remove it")
        scratch.rename(destination)
        sync(destination.parent)
    except OSError as error:
        raise Failure(f"cannot write {destination}: {error.strerror or error}") from error
    finally:
        if scratch.is_dir():
            shutil.rmtree(scratch, ignore_errors=True)
        else:
            scratch.unlink(missing_ok=True)


def _token_ids(opened: opening.Opened) -> dict[str, Any]:
    """The ids in a native model's config, and the tokenizer's end of a document where that names none."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    found = {name: getattr(opened.model.config, name, None) for name in names}
    if found["eos_token_id"] is None:
        found["eos_token_id"] = opened.tokenizer.end_of_document
    return found


def _special(tokens: dict[str, Any]) -> dict[str, int]:
    """The ids as GGUF files have them, of which each is one: of several ends the first."""
    first = {name: value[0] if isinstance(value, list) else value for name, value in tokens.items()}
    keys = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    return {key: first[name] for name, key in keys.items() if first[name] is not None}


def _take_along(source: Path, destination: Path, tokens: dict[str, Any]) -> None:
    """Copies tokenizer, chat template and licence, and the generation settings or the ids that end a text."""
    for pattern in _TAKEN:
        for path in source.glob(pattern):
            if path.is_file():
                shutil.copyfile(path, destination / path.name)
    settings = destination / "generation_config.json"
    if not settings.exists():
        named = {name: value for name, value in tokens.items() if value is not None}
        settings.write_text(json.dumps(named, indent=2) + "\n", encoding="utf-8")


def _chat_template(folder: Path) -> str | None:
    """The chat template beside a tokenizer. Raises UsageError where it cannot be read."""
    try:
        if (file := folder / "chat_template.jinja").is_file():
            return read(file).decode()
        file = folder / "tokenizer_config.json"
        found = json_text.parse_object(read(file)).get("chat_template") if file.is_file() else None
    except (OSError, ValueError) as error:
        raise UsageError(f"{file} cannot be read: {error}; save the tokenizer anew") from error
    return found if isinstance(found, str) else None
