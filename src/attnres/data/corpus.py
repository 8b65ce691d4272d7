"""A corpus as tokens, split into training and validation, from the cache where it has them.

Design choices
- SHA-256 tells validation from train: of the path inside the corpus for text files, of the text for records (JSON,
  CSV, Parquet, datasets). So every copy of a corpus splits alike and duplicate records stay on one side. Where that
  leaves a side empty (a single file, a few documents), the end of the corpus is held out instead.
- A cache entry is one file: a header line, the training tokens, the validation tokens. Its name is a hash of the
  inputs' content (their paths inside the corpus included), the tokenizer and the split.
"""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import json
import logging
import shutil
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from .. import json_text
from ..errors import UsageError
from ..files import default_cache_dir, user_path
from .batches import Batches, validation_batches
from .cache import cached
from .pieces import PIECE_BYTES
from .sources import Source, open_source
from .tokenizer import Tokenizer, load_tokenizer

__all__ = ["Batches", "Corpus", "default_cache_dir", "load_corpus", "validation_batches"]

LOGGER = logging.getLogger(__name__)
BATCH_BYTES = 4 * 2**20
HEADER_BYTES = 512
CACHE_FORMAT = 1


def load_corpus(
    data: str | None = None,
    tokenizer: str = "bytes",
    cache_dir: Path | str | None = None,
    *,
    text_column: str = "text",
    validation_fraction: float = 0.05,
) -> Corpus:
    """Tokens of `data`, from the cache where it has them.

    `data` is one of
    - None or "stdlib": the .py files of this Python's standard library, without its tests;
    - a UTF-8 text file: one with a suffix of TEXT_SUFFIXES or with none;
    - a JSONL (.jsonl, .ndjson), JSON (a list of objects, or one a line), CSV, TSV or Parquet file: a document per
      record, in its column `text_column`; "a.b" is the field b of the objects in a;
    - either of them compressed: .gz, .bz2, .xz or .zst behind its suffix (but for Parquet);
    - a folder that `datasets` saved with save_to_disk: its split "train", or all of it where it has no splits;
    - any other folder: its JSONL and Parquet files, its text files, or its other records, the first of these that it
      has; JSONL or Parquet beside texts that are more than a card (README, LICENSE) is refused. Hidden files are left
      out, links are followed, and what is no part of the corpus or no UTF-8 is told;
    - NAME or NAME:CONFIG of a dataset on the Hugging Face Hub: its split "train".

    `tokenizer`: see `load_tokenizer`. "train:VOCAB" learns from the training documents only, unless the corpus has too
    few to split. `validation_fraction`: expected share of the documents (of the tokens, where the end of the corpus is
    held out). `cache_dir`: see `default_cache_dir`. Files are hashed at each call, records of `datasets` are not.
    Raises UsageError for bad input and Failure where the cache cannot be written.
    """
    if not 0 < validation_fraction < 1:
        raise UsageError(f"validation_fraction must lie between 0 and 1, but is {validation_fraction}")
    cache_dir = default_cache_dir() if cache_dir is None else user_path(cache_dir)
    source = open_source("stdlib" if data is None else str(data), text_column)

    def training_text() -> Iterator[bytes]:
        sides = ((is_held_out(key, validation_fraction), pieces) for key, pieces in source.documents())
        training = itertools.chain.from_iterable(pieces for held_out, pieces in sides if not held_out)
        everything = itertools.chain.from_iterable(pieces for _, pieces in source.documents())
        first = next(training, None)
        yield from everything if first is None else itertools.chain([first], training)

    encoder = load_tokenizer(tokenizer, training_text, cache_dir)
    identity: list[Any] = [CACHE_FORMAT, source.fingerprint, encoder.fingerprint, validation_fraction]
    if encoder.marks_starts:
        identity.append("marks one start a document")  # older caches may hold such marks inside long documents
    key = hashlib.blake2b(json.dumps(identity).encode(), digest_size=16).hexdigest()
    train, validation = cached(
        cache_dir / "tokens" / f"{key}.tokens",
        partial(_read_cache, key=key),
        partial(_write_cache, key=key, source=source, tokenizer=encoder, fraction=validation_fraction),
    )
    return Corpus(source.name, key, encoder, train, validation)


@dataclass(frozen=True)
class Corpus:
    """Tokens of a corpus: uint16 or uint32 [N], mapped from the cache, read-only.

    Every document ends in `tokenizer.end_of_document`. `fingerprint` names the content, the tokenizer and the split:
    equal input files give equal fingerprints on every machine.
    """

    name: str
    fingerprint: str
    tokenizer: Tokenizer
    train: np.ndarray
    validation: np.ndarray


def _read_cache(path: Path, key: str) -> tuple[np.ndarray, np.ndarray] | None:
    try:
        with open(path, "rb") as file:
            header = json_text.parse_object(file.read(HEADER_BYTES))
            dtype, train, validation = np.dtype(header["dtype"]), header["train"], header["validation"]
            end = HEADER_BYTES + (train + validation) * dtype.itemsize
            if (header["key"], path.stat().st_size) == (key, end) and _checksum(file) == header["crc32"]:
                mapped = np.memmap(path, dtype, "r", HEADER_BYTES, (train,))
                return mapped, np.memmap(path, dtype, "r", HEADER_BYTES + mapped.nbytes, (validation,))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError):
        pass
    LOGGER.warning("the token cache %s is damaged or foreign: building it again", path)
    return None


def _write_cache(file: BinaryIO, key: str, source: Source, tokenizer: Tokenizer, fraction: float) -> None:
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
    end = np.array([tokenizer.end_of_document])
    file.write(bytes(HEADER_BYTES))
    with (
        tempfile.TemporaryFile(dir=Path(file.name).parent) as held_out_file,
        _progress(f"tokenising {source.name}", source.text_bytes) as advance,
    ):
        for batch in _text_batches(source, fraction):
            encoded = tokenizer.encode_batch([piece.text for piece in batch], [piece.goes_on for piece in batch])
            for (held_out, _, text), ids in zip(batch, encoded, strict=True):
                side = held_out_file if held_out else file
                side.write((ids if text else end).astype(dtype).tobytes())
                advance(len(text))
        train = (file.tell() - HEADER_BYTES) // dtype.itemsize
        held_out_file.seek(0)
        shutil.copyfileobj(held_out_file, file)
    total = (file.tell() - HEADER_BYTES) // dtype.itemsize
    if total == 0:
        raise UsageError(f"--data {source.name} is empty; give a corpus with text")
    if train in (0, total):
        # Text and its end make at least two tokens, so both sides get one.
        train = min(max(1, total - round(total * fraction)), total - 1)
    file.flush()
    file.seek(HEADER_BYTES)
    header = {"key": key, "dtype": dtype.str, "train": train, "validation": total - train, "crc32": _checksum(file)}
    file.seek(0)
    file.write(json.dumps(header).encode().ljust(HEADER_BYTES - 1) + b"\n")


class Piece(NamedTuple):
    """A part of a document; goes_on: not its first. An empty text ends a document."""

    held_out: bool
    goes_on: bool
    text: bytes


def _text_batches(source: Source, fraction: float) -> Iterator[list[Piece]]:
    """All text in batches to encode."""
    batch: list[Piece] = []
    size = 0
    for key, pieces in source.documents():
        held_out, goes_on, piece = is_held_out(key, fraction), False, b""
        for piece in pieces:
            batch.append(Piece(held_out, goes_on, piece))
            goes_on = True
            size += len(piece)
            if size >= BATCH_BYTES:
                yield batch
                batch, size = [], 0
        if piece:
            batch.append(Piece(held_out, False, b""))
    if batch:
        yield batch


def _checksum(file: BinaryIO) -> int:
    """CRC-32 from here to the end of the file: it finds damage, several times faster than a cryptographic hash."""
    checksum = 0
    while block := file.read(PIECE_BYTES):
        checksum = zlib.crc32(block, checksum)
    return checksum


@contextmanager
def _progress(title: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """Shows the bytes done on stderr: a bar on a terminal where rich is installed, else a line every ten seconds."""
    if sys.stderr.isatty() and importlib.util.find_spec("rich"):
        from rich.console import Console
        from rich.progress import DownloadColumn, Progress

        columns = (*Progress.get_default_columns(), DownloadColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(title, total=total)
            yield lambda size: bar.advance(task, size)
        return
    done, shown = 0, time.monotonic()
    of_total = f" of {total / 1e6:.0f} MB" if total else ""

    def advance(size: int) -> None:
        nonlocal done, shown
        done += size
        if time.monotonic() - shown > 10:
            shown = time.monotonic()
            print(f"{title}: {done / 1e6:.0f} MB{of_total}", file=sys.stderr, flush=True)

    yield advance


def is_held_out(key: bytes, fraction: float) -> bool:
    """Whether a document with this key is kept from training, the expected share of all that are."""
    return int.from_bytes(hashlib.sha256(key).digest()[:8], "big") < fraction * 2**64
