"""What files and folders need beyond pathlib: one reading of paths, whole files, file systems that can do less."""

from __future__ import annotations

import errno
import os
import stat
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from .errors import UsageError

_NOT_ABLE = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF)


def user_path(path: str | Path) -> Path:
    """A path that a user has written, with ~ and ~NAME at its start as the home folder they stand for.

    Shells leave it as it is in --flag=~/x, and so do YAML files and environment variables. Raises UsageError where
    there is no such home folder.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UsageError(f"{path} begins with a home folder that is not known here; write the path in full") from error


def is_gguf(path: str | Path) -> bool:
    """Whether a path is that of a model in one GGUF file."""
    return Path(path).suffix.lower() == ".gguf" and Path(path).is_file()


def default_cache_dir() -> Path:
    """ATTNRES_CACHE, else XDG_CACHE_HOME/attnres, else ~/.cache/attnres. Raises UsageError where there
    is no home."""
    if folder := os.environ.get("ATTNRES_CACHE"):
        return user_path(folder)
    if folder := os.environ.get("XDG_CACHE_HOME"):
        return user_path(folder) / "attnres"
    try:
        return Path.home() / ".cache" / "attnres"
    except RuntimeError as error:
        raise UsageError("no home folder is known here to cache tokens in; set ATTNRES_CACHE to a folder") from error


def opened_if_regular(path: str, flags: int) -> int:
    """An `opener` for open(): raises OSError for what is no file, such as a FIFO, where reading would never end."""
    descriptor = _opened_at_once(path, flags)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is not a regular file")
    return descriptor


def _opened_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK, 0o666)  # a FIFO would have it wait for who is at the other end


def read(path: Path) -> bytes:
    """The contents of a regular file. Raises OSError, also for anything that is no file."""
    with open(path, "rb", opener=opened_if_regular) as file:
        return file.read()


def write(path: Path, text: str) -> None:
    """Writes a file as UTF-8, whole, synced and under its name, or not at all. Raises OSError."""
    # all that ever writes such a file is one process at a time, and what a killed one left is written over
    write_whole(path, lambda file: file.write(text.encode()), path.with_name(path.name + ".tmp"))


def write_whole(path: Path, write: Callable[[BinaryIO], object], scratch: Path | None = None) -> None:
    """Has `write` fill a file, which then takes the name `path` at once, synced, or is not there at all.

    scratch: the file's name until then; the default is one that no other process uses. Raises OSError.
    """
    scratch = scratch or path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        with open(scratch, "w+b", opener=_opened_at_once) as file:
            write(file)
        sync(scratch)
        os.replace(scratch, path)
    finally:
        with suppress(OSError):
            scratch.unlink()
    sync(path.parent)  # the new name itself is durable only then


def sync(path: Path) -> None:
    """Returns once the contents of a file or folder are on the disk, as far as its file system can say so.

    Some network file systems refuse this for folders, and a folder may be closed to readers: its names then get to the
    disk in the file system's own time. Raises OSError for what went wrong in writing.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:
        if path.is_dir():
            return
        raise
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NOT_ABLE:
            raise
    finally:
        os.close(descriptor)
