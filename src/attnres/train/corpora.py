"""Where text comes from: files, folders, records and Hugging Face datasets, each read as documents of UTF-8.

Design choices
- The default corpus is the source of the Python standard library on this machine: real text, no download.
- A document of a text file goes by its path inside the corpus, a record by its text, so copies of a corpus are equal.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import platform
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..files import user_path

LOGGER = logging.getLogger(__name__)
RECORD_SUFFIXES = (".jsonl", ".ndjson", ".parquet")
TEXT_SUFFIXES = (
    *(".txt", ".text", ".md", ".rst", ".tex", ".html", ".htm", ".xml", ".py", ".pyi", ".c", ".h", ".cc", ".cpp"),
    *(".hpp", ".cu", ".cuh", ".rs", ".go", ".java", ".kt", ".scala", ".js", ".ts", ".sh", ".sql", ".r", ".jl", ".lua"),
    *(".rb", ".php", ".swift", ".hs", ".ml"),
)
# Many distributions install the library without its tests, and site-packages is not the library.
NOT_THE_LIBRARY = ("site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__")
PIECE_BYTES = 2**20

# The key that decides a document's side of the split, and its UTF-8 text in pieces that are not empty and cut no
# character.
Document = tuple[bytes, Iterable[bytes]]


@dataclass(frozen=True)
class Source:
    """A corpus that has been found and not yet tokenised; `documents` reads it again at each call.

    `fingerprint` differs where the content, the paths inside the corpus or the text column differ.
    """

    name: str
    fingerprint: str
    text_bytes: int | None  # for the progress display; None where only reading tells
    documents: Callable[[], Iterator[Document]]


def open_source(data: str, text_column: str) -> Source:
    """The corpus that `data` names, "stdlib" included: see `load_corpus`.

    Files are hashed here and read for good by `documents`. Raises UsageError where `data` is absent, binary, of an
    unknown kind, or needs a package that is missing; malformed records raise it once they are reached.
    """
    known = (*RECORD_SUFFIXES, *TEXT_SUFFIXES)
    if data == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        files = [path for path in _walk(root, excluded=NOT_THE_LIBRARY) if path.suffix == ".py"]
        if not files:
            raise UsageError(f"this Python has no library source in {root}; give --data a text file or a folder")
        return _files_source(f"python-{platform.python_version()}-stdlib", root, files, text_column)
    path = user_path(data)
    if path.is_file():
        if path.suffix.lower() not in ("", *known):
            raise UsageError(f"--data {data} has an unknown suffix; rename it to one of {' '.join(known)}")
        return _files_source(path.name, path.parent, [path], text_column)
    if data and path.is_dir():
        if (path / "dataset_dict.json").exists() or (path / "dataset_info.json").exists():
            return _dataset_source(data, lambda library: library.load_from_disk(str(path)), text_column)
        files = [file for file in _walk(path) if file.suffix.lower() in known]
        if not files:
            raise UsageError(f"--data {data} is a folder without a file that is read: one of {' '.join(known)}")
        records = [file for file in files if file.suffix.lower() in RECORD_SUFFIXES]
        return _files_source(path.resolve().name, path, records or files, text_column)
    if path.suffix.lower() in known or not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?(:[\w.-]+)?", data):
        raise UsageError(
            f"--data {data!r} does not exist; give a text, JSONL or Parquet file, a folder or a Hub dataset"
        )
    name, _, config = data.partition(":")
    return _dataset_source(data, lambda library: library.load_dataset(name, config or None, split="train"), text_column)


def _walk(root: Path, excluded: tuple[str, ...] = ()) -> list[Path]:
    """Visible files under `root` in the order of their paths inside it, which is the same on every machine."""
    files = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in excluded and not name.startswith(".")]
        files += [Path(folder, name) for name in names if not name.startswith(".")]
    return sorted((file for file in files if file.is_file()), key=lambda file: file.relative_to(root).as_posix())


def _files_source(name: str, root: Path, files: list[Path], text_column: str) -> Source:
    digest, text_bytes = hashlib.blake2b(text_column.encode(), digest_size=16), 0
    kept: list[tuple[bytes, Path]] = []
    binary: list[Path] = []
    for path in files:
        content, is_text = hashlib.blake2b(digest_size=16), True
        for piece in _pieces(path):
            content.update(piece)
            is_text = is_text and (path.suffix.lower() == ".parquet" or _is_text(piece))
        if not is_text:
            binary.append(path)
            continue
        inside = path.relative_to(root).as_posix().encode("utf-8", "surrogateescape")
        digest.update(inside + b"\0" + content.digest())
        text_bytes += path.stat().st_size
        kept.append((inside, path))
    if not kept:
        raise UsageError(f"--data {name} is binary (NUL bytes or not UTF-8); convert it to UTF-8 text")
    if binary:
        LOGGER.warning("%s: skipped %d binary files (NUL bytes or not UTF-8), such as %s", name, len(binary), binary[0])

    def documents() -> Iterator[Document]:
        for inside, path in kept:
            if path.suffix.lower() == ".parquet":
                yield from _records(_parquet_texts(path, text_column))
            elif path.suffix.lower() in RECORD_SUFFIXES:
                yield from _records(_jsonl_texts(path, text_column))
            else:
                yield inside, _pieces(path)

    is_parquet = any(path.suffix.lower() == ".parquet" for _, path in kept)
    return Source(name, digest.hexdigest(), None if is_parquet else text_bytes, documents)


def _pieces(path: Path) -> Iterator[bytes]:
    """A file in pieces of about a mebibyte that end with a line: none cuts a character and few cut a BPE token."""
    try:
        with open(path, "rb") as file:
            while lines := file.readlines(PIECE_BYTES):
                yield b"".join(lines)
    except OSError as error:
        raise UsageError(f"--data file {path} cannot be read: {error.strerror}") from error


def _is_text(piece: bytes) -> bool:
    try:
        return "\0" not in piece.decode("utf-8")
    except UnicodeDecodeError:
        return False


def _records(texts: Iterable[tuple[str, Any]]) -> Iterator[Document]:
    for place, text in texts:
        if not isinstance(text, str | None):
            raise UsageError(f"{place} holds {type(text).__name__}, not text; name the right column with text_column")
        # JSON may spell lone surrogates, which have no UTF-8 form.
        content = (text or "").encode("utf-8", errors="replace")
        yield content, [content] if content else []


def _jsonl_texts(path: Path, column: str) -> Iterator[tuple[str, Any]]:
    lines = itertools.chain.from_iterable(piece.splitlines() for piece in _pieces(path))
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UsageError(f"line {number} of {path} is not JSON ({error}); give one JSON object a line") from error
        if not isinstance(record, dict):
            raise UsageError(f"line {number} of {path} is not a JSON object; give one JSON object a line")
        _require_column(column, record, f"line {number} of {path}")
        yield f"column {column!r} in line {number} of {path}", record[column]


def _parquet_texts(path: Path, column: str) -> Iterator[tuple[str, Any]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise UsageError(f"--data file {path} needs the package datasets: pip install 'attnres[train]'") from error
    try:
        with parquet.ParquetFile(path) as file:
            _require_column(column, file.schema_arrow.names, str(path))
            for batch in file.iter_batches(batch_size=1024, columns=[column]):
                for text in batch.column(0).to_pylist():
                    yield f"column {column!r} of {path}", text
    except (pyarrow.ArrowException, OSError) as error:
        raise UsageError(f"--data file {path} is no readable Parquet, give another: {_first_line(error)}") from error


def _dataset_source(name: str, load: Callable[[Any], Any], column: str) -> Source:
    try:
        import datasets
    except ImportError as error:
        raise UsageError(
            f"--data {name} is no file; as a Hugging Face dataset it needs the package datasets: "
            "pip install 'attnres[train]'"
        ) from error
    try:
        dataset = load(datasets)
    except Exception as error:  # no network, no such name, gated, no config chosen: each has its own class there
        raise UsageError(
            f"--data {name} is no file or folder of text, and datasets cannot load it: {_first_line(error)}"
        ) from error
    if isinstance(dataset, dict):
        if "train" not in dataset:
            raise UsageError(
                f"--data {name} has no split 'train', only {sorted(dataset)}; give the folder of one split"
            )
        dataset = dataset["train"]
    _require_column(column, dataset.column_names, f"--data {name}")

    def texts() -> Iterator[tuple[str, Any]]:
        for batch in dataset.select_columns([column]).iter(batch_size=1024):
            yield from ((f"column {column!r} of {name}", text) for text in batch[column])

    return Source(Path(name).name, f"{dataset._fingerprint} {column}", None, lambda: _records(texts()))


def _require_column(column: str, found: Iterable[str], place: str) -> None:
    if column not in found:
        raise UsageError(f"{place} has no column {column!r}, only {sorted(found)}; name one with text_column")


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
