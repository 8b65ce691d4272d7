"""Text files are UTF-8. Anything else is refused with the way out, never read as what it is not."""

from __future__ import annotations

from pathlib import Path

from .errors import UsageError

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
UTF_16_MARKS = (b"\xff\xfe", b"\xfe\xff")


def read_text(path: str | Path, argument: str) -> str:
    """The text of a UTF-8 file, without a byte order mark.

    Raises UsageError, which calls the file `argument` and its path, where there is none and where it is not UTF-8.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise UsageError(f"{argument} {path} cannot be read: {error.strerror or error}; give a text file") from error
    try:
        return content.removeprefix(BYTE_ORDER_MARK).decode()
    except UnicodeDecodeError:
        raise UsageError(f"{argument} {path} {why_no_text(content)}") from None


def why_no_text(content: bytes) -> str | None:
    """What keeps whole lines of a file from being text, with the mend, to follow the file's name; None for text."""
    if content.startswith(UTF_16_MARKS):
        return "is UTF-16; convert it, for example with iconv -f UTF-16 -t UTF-8"
    if b"\0" in content:
        return "is binary (it holds NUL bytes); give a text"
    try:
        content.decode()
    except UnicodeDecodeError as error:
        return (
            f"is not UTF-8 (byte 0x{content[error.start]:02x}); convert it, for example with iconv -f LATIN1 -t UTF-8"
        )
    return None
