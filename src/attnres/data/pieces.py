"""Files as bytes: decompressed, without a byte order mark, in pieces that a tokenizer can take one by one."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..text_file import BYTE_ORDER_MARK

PIECE_BYTES = 2**20
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
WORD = 1024
_KINDS = (r"[^\W\d_]", r"\d", r"[^\w\s]", "_", r"\s")
_LONG = re.compile("|".join(f"(?<!{kind}){kind}{{{WORD},}}" for kind in _KINDS))
_MAYBE_LONG = re.compile(rb"(?<!\S)\S{%d}|(?<!\s)\s{%d}" % (WORD, WORD))  # a faster look: without it there is no _LONG
DAMAGED = (EOFError, zlib.error, lzma.LZMAError)


def kind(path: Path) -> str:
    """The suffix that says what is in a file, in lower case, whether it is compressed or not."""
    return (Path(path.stem) if path.suffix.lower() in COMPRESSIONS else path).suffix.lower()


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A file's bytes, decompressed, without a byte order mark. Raises UsageError where it cannot be read."""
    try:
        with _open(path) as file:
            if file.peek(len(BYTE_ORDER_MARK)).startswith(BYTE_ORDER_MARK):
                file.read(len(BYTE_ORDER_MARK))
            yield file
    except DAMAGED as error:
        raise UsageError(f"--data file {path} is damaged ({error}); give it whole") from error
    except OSError as error:
        raise UsageError(f"--data file {path} cannot be read: {error.strerror or error}") from error


def pieces(path: Path) -> Iterator[bytes]:
    """A file in pieces of about a mebibyte, as `cut` cuts. Raises UsageError where it cannot be read."""
    with opened(path) as file:
        yield from cut(iter(lambda: b"".join(file.readlines(PIECE_BYTES)), b""))


def lines(path: Path) -> Iterator[bytes]:
    """The lines of a file, however long. Raises UsageError where it cannot be read."""
    with opened(path) as file:
        for line in file:
            yield from line.splitlines()


def cut(texts: Iterable[bytes]) -> Iterator[bytes]:
    """The same text in pieces that are not empty and at most twice a mebibyte, cut where a token ends.

    A line's end is such a place; a long line is cut in front of a space, and one without spaces between characters.
    """
    for text in texts:
        begin = 0
        while len(text) - begin > 2 * PIECE_BYTES:
            end = _border(text, begin, begin + PIECE_BYTES)
            yield text[begin:end]
            begin = end
        if begin < len(text):
            yield text[begin:]


def cut_words(text: bytes) -> Iterator[str]:
    """The same text in parts without a word of more than WORD characters, which a BPE takes in squared time to learn.

    A word is what byte-level BPE keeps together: letters, digits, spaces or signs in a row. Text is UTF-8; what is not
    becomes U+FFFD.
    """
    spelled = text.decode("utf-8", errors="replace")
    begin = 0
    if _MAYBE_LONG.search(text):
        for word in _LONG.finditer(spelled):
            for end in range(word.start() + WORD, word.end(), WORD):
                yield spelled[begin:end]
                begin = end
    yield spelled[begin:]


def _border(text: bytes, begin: int, limit: int) -> int:
    line = text.rfind(b"\n", begin, limit) + 1
    if line > begin:
        return line
    space = text.rfind(b" ", begin + 1, limit)
    while space > begin + 1 and text[space - 1 : space] == b" ":  # a run of spaces may be one token
        space -= 1
    if space > begin + 1:
        return space
    while limit > begin + 1 and text[limit] & 0xC0 == 0x80:  # in the middle of a character
        limit -= 1
    return limit


def _open(path: Path) -> Any:
    compression = path.suffix.lower()
    if compression == ".gz":
        return gzip.open(path)
    if compression == ".bz2":
        return bz2.open(path)
    if compression == ".xz":
        return lzma.open(path)
    if compression == ".zst":
        try:
            import pyarrow
        except ImportError as error:
            raise UsageError(f"--data file {path} needs the package datasets: pip install 'attnres[train]'") from error
        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
    return open(path, "rb")
