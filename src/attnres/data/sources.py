"""Where text comes from: files, folders, records and Hugging Face datasets, each read as documents of UTF-8.

Design choices
- The default corpus is the source of the Python standard library on this machine: real text, no download.
- A document of a text file goes by its path inside the corpus, a record by its text, so copies of a corpus are equal.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UsageError, first_line
from ..files import user_path
from ..text_file import why_no_text
from . import records
from .pieces import COMPRESSIONS, cut, kind, pieces

LOGGER = logging.getLogger(__name__)
RECORD_SUFFIXES = (*records.LINE_SUFFIXES, records.PARQUET)
# Records too, but beside texts such files are as likely settings or tables: they count where a folder has no others.
MAYBE_RECORD_SUFFIXES = (".json", *records.TABLE_SUFFIXES)
TEXT_SUFFIXES = (
    *(".txt", ".text", ".md", ".rst", ".tex", ".html", ".htm", ".xml", ".py", ".pyi", ".c", ".h", ".cc", ".cpp"),
    *(".hpp", ".cu", ".cuh", ".rs", ".go", ".java", ".kt", ".scala", ".js", ".ts", ".sh", ".sql", ".r", ".jl", ".lua"),
    *(".rb", ".php", ".swift", ".hs", ".ml"),
)
# Names of files that describe a corpus and are no part of it.
CARDS = re.compile(
    r"(readme|licen[cs]e|copying|notice|citation|changelog|changes|dataset_infos?|config)\b", re.IGNORECASE
)
# Many distributions install the library without its tests, and site-packages is not the library.
NOT_THE_LIBRARY = ("site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__")

# (key, text): the key decides on which side of the split the document is; the text is UTF-8, in pieces that are not
# empty and end behind whole characters.
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
    known = (*RECORD_SUFFIXES, *MAYBE_RECORD_SUFFIXES, *TEXT_SUFFIXES)
    if data == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        files = [path for path in _walk(root, excluded=NOT_THE_LIBRARY) if path.suffix == ".py"]
        if not files:
            raise UsageError(f"this Python has no library source in {root}; give --data a text file or a folder")
        return _files_source(f"python-{platform.python_version()}-stdlib", root, files, text_column)
    path = user_path(data)
    if path.is_file():
        if not _is_known(path) and kind(path):
            raise UsageError(
                f"--data {data} has an unknown suffix; rename it to one of {' '.join(known)}, "
                f"with {' '.join(COMPRESSIONS)} behind it where it is compressed"
            )
        return _files_source(path.name, path.parent, [path], text_column)
    if data and path.is_dir():
        if (path / "dataset_dict.json").exists() or (path / "dataset_info.json").exists():
            return _dataset_source(data, lambda library: library.load_from_disk(str(path)), text_column)
        return _files_source(path.resolve().name, path, _chosen(_walk(path), data), text_column)
    if kind(path) in known or not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?(:[\w.-]+)?", data):
        raise UsageError(
            f"--data {data!r} does not exist; give a text, JSONL or Parquet file, a folder or a Hub dataset"
        )
    name, _, config = data.partition(":")
    return _dataset_source(data, lambda library: library.load_dataset(name, config or None, split="train"), text_column)


def record_files(data: str) -> list[Path]:
    """The JSONL and Parquet files of a corpus, as `open_source` has them: the one that `data` names, or those of the
    folder; none where it names something else."""
    path = user_path(data)
    files = _walk(path) if data and path.is_dir() else [path] if path.is_file() else []
    return [file for file in files if _is_known(file) and kind(file) in RECORD_SUFFIXES]


def _is_known(path: Path) -> bool:
    suffix = kind(path)
    if suffix == records.PARQUET:  # which compresses its own columns
        return path.suffix.lower() == suffix
    return suffix in (*RECORD_SUFFIXES, *MAYBE_RECORD_SUFFIXES, *TEXT_SUFFIXES)


def _walk(root: Path, excluded: tuple[str, ...] = ()) -> list[Path]:
    """Visible files under `root`, links followed, in the order of their paths inside it: the same on every machine.

    A folder to which several paths lead is read once, under the first of them. Raises UsageError for a folder that
    cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise UsageError(f"the folder {error.filename} cannot be read: {error.strerror}; leave it out of the corpus")

    files, seen = [], {_identity(root)}
    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=refuse):
        inside = sorted(name for name in subfolders if name not in excluded and not name.startswith("."))
        new: list[str] = []
        for name in sorted(inside, key=lambda name: os.path.islink(Path(folder, name))):  # links after folders
            if (identity := _identity(Path(folder, name))) not in seen:
                seen.add(identity)
                new.append(name)
        subfolders[:] = sorted(new)
        files += [Path(folder, name) for name in names if not name.startswith(".")]
    if lost := [file for file in files if file.is_symlink() and not file.exists()]:
        LOGGER.warning("%s: %d links lead nowhere, such as %s", root, len(lost), lost[0])
    return sorted((file for file in files if file.is_file()), key=lambda file: file.relative_to(root).as_posix())


def _identity(folder: Path) -> tuple[int, int]:
    found = folder.stat()
    return found.st_dev, found.st_ino


def _chosen(files: list[Path], data: str) -> list[Path]:
    """The files of a folder that are its corpus: records or texts, never both."""
    known = [file for file in files if _is_known(file)]
    if not known:
        suffixes = " ".join((*RECORD_SUFFIXES, *MAYBE_RECORD_SUFFIXES, *TEXT_SUFFIXES))
        raise UsageError(f"--data {data} is a folder without a file that is read: one of {suffixes}")
    cards = {file for file in known if CARDS.match(file.name)}
    sure = [file for file in known if kind(file) in RECORD_SUFFIXES]
    maybe = [file for file in known if kind(file) in MAYBE_RECORD_SUFFIXES and file not in cards]
    texts = [file for file in known if kind(file) in TEXT_SUFFIXES]
    if sure and (more := [file for file in texts if file not in cards]):
        raise UsageError(
            f"--data {data} holds both texts ({len(more)}, such as {more[0].name}) and records ({len(sure)}, such as "
            f"{sure[0].name}); give a folder with one of them, or a file"
        )
    if sure:
        chosen = sure
    elif texts and not (cards.issuperset(texts) and maybe):
        chosen = texts
    else:
        chosen = maybe or known
    kept = set(chosen)
    if left := [file for file in files if file not in kept]:
        LOGGER.warning("%s: %d of %d files are no part of the corpus, such as %s", data, len(left), len(files), left[0])
    return chosen


def _files_source(name: str, root: Path, files: list[Path], text_column: str) -> Source:
    digest, text_bytes = hashlib.blake2b(text_column.encode(), digest_size=16), 0
    kept: list[tuple[bytes, Path]] = []
    refused: list[tuple[Path, str]] = []
    for path in files:
        content, problem = hashlib.blake2b(digest_size=16), None
        for piece in pieces(path):
            content.update(piece)
            text_bytes += len(piece)
            if problem is None and kind(path) != records.PARQUET:
                problem = why_no_text(piece)
        if problem is not None:
            refused.append((path, problem))
            continue
        inside = path.relative_to(root).as_posix().encode("utf-8", "surrogateescape")
        digest.update(inside + b"\0" + content.digest())
        kept.append((inside, path))
    if refused:
        path, problem = refused[0]
        if not kept:
            raise UsageError(f"--data file {path} {problem}")
        LOGGER.warning("%s: skipped %d files that are no UTF-8 text; %s %s", name, len(refused), path, problem)

    def documents() -> Iterator[Document]:
        for inside, path in kept:
            if kind(path) in TEXT_SUFFIXES or not kind(path):
                yield inside, pieces(path)
            else:
                yield from _records(records.values(path, text_column))

    is_parquet = any(kind(path) == records.PARQUET for _, path in kept)
    return Source(name, digest.hexdigest(), None if is_parquet else text_bytes, documents)


def _records(found: Iterable[records.Placed]) -> Iterator[Document]:
    for text in records.texts(found):
        yield text, cut([text])


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
            f"--data {name} is no file or folder of text, and datasets cannot load it: {first_line(error)}"
        ) from error
    if isinstance(dataset, dict):
        if "train" not in dataset:
            raise UsageError(
                f"--data {name} has no split 'train', only {sorted(dataset)}; give the folder of one split"
            )
        dataset = dataset["train"]
    records.top_column(dataset.column_names, f"--data {name}", column)
    return Source(
        Path(name).name,
        f"{dataset._fingerprint} {column}",
        None,
        lambda: _records(records.of_dataset(dataset, name, column)),
    )
