"""Records, each a document: the texts in one column of JSON, CSV and Parquet files and of Hugging Face datasets."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ..errors import UsageError, first_line
from ..json_text import parse
from .pieces import kind, lines, opened

LINE_SUFFIXES = (".jsonl", ".ndjson")
PARQUET = ".parquet"
TABLE_SUFFIXES = {".csv": ",", ".tsv": "\t"}
TURNS = ({"role", "content"}, {"from", "value"})
"""The fields of a message in a conversation, as chat data sets name them."""
CHAT = "make one text of each conversation first, such as with a tokenizer's apply_chat_template"

# (what messages call the place of a value, the value)
Placed = tuple[str, Any]


def texts(found: Iterable[Placed]) -> Iterator[bytes]:
    """UTF-8 of each value. Raises UsageError for one that is neither text nor nothing."""
    for place, value in found:
        if isinstance(value, bytes):
            try:
                value = value.decode()
            except UnicodeDecodeError as error:
                raise UsageError(f"{place} holds bytes that are not UTF-8; convert them to text first") from error
        if not isinstance(value, str | None):
            raise UsageError(f"{place} holds {_described(value)}")
        # JSON may spell lone surrogates, which have no UTF-8 form.
        yield (value or "").encode("utf-8", errors="replace")


def values(path: Path, column: str) -> Iterator[Placed]:
    """The values of `column` in a file of records. A name with dots leads into objects: "a.b" is b in a.

    Raises UsageError for a file that is malformed or has no such column, once that is reached.
    """
    if kind(path) == PARQUET:
        yield from _parquet(path, column)
        return
    read = _table if kind(path) in TABLE_SUFFIXES else _lines if kind(path) in LINE_SUFFIXES else _json
    for place, record in read(path):
        if not isinstance(record, dict):
            raise UsageError(f"{place} is not a JSON object; give one JSON object a record")
        yield f"column {column!r} in {place}", _field(record, column, place)


def of_dataset(dataset: Any, name: str, column: str) -> Iterator[Placed]:
    """The same of a dataset of the library datasets."""
    top = top_column(dataset.column_names, f"--data {name}", column)
    place = f"column {column!r} of {name}"
    try:
        for batch in dataset.select_columns([top]).iter(batch_size=1024):
            for value in batch[top]:
                yield place, _field({top: value}, column, f"--data {name}")
    except UnicodeDecodeError as error:
        raise UsageError(f"{place} holds text that is not UTF-8; convert it first") from error


def top_column(found: Iterable[str], place: str, column: str) -> str:
    """The one of the columns `found` that is `column`, or that holds objects with it. Raises UsageError for none."""
    names = list(found)
    top = column if column in names else column.partition(".")[0]
    if top not in names:
        if chat := [name for name in ("messages", "conversations", "conversation") if name in names]:
            raise UsageError(f"{place} has no column {column!r} but {chat[0]!r}, a conversation: {CHAT}")
        raise UsageError(f"{place} has no column {column!r}, only {sorted(names)}; name one with text_column")
    return top


def _field(record: dict[str, Any], column: str, place: str) -> Any:
    top = top_column(record, place, column)
    inner = record[top]
    if top == column:
        return inner
    if not isinstance(inner, dict):
        if inner is None:
            return None
        raise UsageError(f"{place} has no fields in {top!r} that {column!r} could name; name a column with text_column")
    return _field(inner, column.removeprefix(f"{top}."), f"{top!r} in {place}")


def _described(value: Any) -> str:
    """What a value is that is no text, and the mend."""
    if isinstance(value, dict):
        return f"an object of {sorted(map(str, value))}, not text; name what is in it with a dot, as in text_column=a.b"
    if isinstance(value, list) and value and isinstance(value[0], dict) and any(t <= value[0].keys() for t in TURNS):
        return f"a conversation, not text; {CHAT}"
    return f"{type(value).__name__}, not text; name the right column with text_column"


def _lines(path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(lines(path), start=1):
        if not line.strip():
            continue
        try:
            yield f"line {number} of {path}", parse(line)
        except ValueError as error:
            raise UsageError(f"line {number} of {path} is not JSON ({error}); give one JSON object a line") from error


def _json(path: Path) -> Iterator[tuple[str, Any]]:
    """Of a file .json: a list of records, one record, or lines."""
    with opened(path) as file:
        content = file.read()
    first, *more = content.strip().splitlines() or [b""]
    try:
        parse(first)
        is_lines = bool(more)
    except ValueError:
        is_lines = False
    if is_lines:
        yield from _lines(path)
    elif content.strip():
        try:
            whole = parse(content)
        except ValueError as error:
            raise UsageError(f"{path} is not JSON ({error}); give a list of JSON objects, or one a line") from error
        for number, record in enumerate(whole if isinstance(whole, list) else [whole], start=1):
            yield f"record {number} of {path}", record


def _table(path: Path) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(sys.maxsize)  # by default fields of more than 128 KiB are refused
    with opened(path) as file:
        rows = csv.DictReader(
            io.TextIOWrapper(file, encoding="utf-8", newline=""), delimiter=TABLE_SUFFIXES[kind(path)]
        )
        try:
            for row in rows:
                place = f"line {rows.line_num} of {path}"
                if None in row:
                    raise UsageError(f"{place} has more fields than the first line names; quote fields with separators")
                yield place, row
        except csv.Error as error:
            raise UsageError(f"line {rows.line_num} of {path} is malformed ({error}); mend it") from error


def _parquet(path: Path, column: str) -> Iterator[Placed]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise UsageError(f"--data file {path} needs the package datasets: pip install 'attnres[train]'") from error
    place = f"column {column!r} of {path}"
    try:
        with parquet.ParquetFile(path) as file:
            top = top_column(file.schema_arrow.names, str(path), column)
            for batch in file.iter_batches(batch_size=1024, columns=[top]):
                for value in batch.column(top).to_pylist():
                    yield place, _field({top: value}, column, str(path))
    except UnicodeDecodeError as error:
        raise UsageError(f"{place} holds text that is not UTF-8; convert it, or write that column anew") from error
    except (pyarrow.ArrowException, OSError) as error:
        raise UsageError(f"--data file {path} is no readable Parquet, give another: {first_line(error)}") from error
