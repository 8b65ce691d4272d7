"""Files that are whole and synced, or not there at all: the one way into the cache folder."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO, TypeVar

from filelock import FileLock

from ..errors import Failure
from ..files import write_whole

T = TypeVar("T")


def cached(path: Path, load: Callable[[Path], T | None], write: Callable[[BinaryIO], object]) -> T:
    """What `load` reads from the cache entry `path`; where that is None (missing, damaged), `write` builds it first.

    One process builds while others wait. The entry is written under another name, synced and renamed, so a kill at any
    moment leaves it whole or absent. Raises Failure where the folder cannot be written or the disk is full.
    """
    if (value := load(path)) is not None:
        return value
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with _alone(path) as alone:
            if (value := load(path)) is not None:
                return value
            for left_by_a_killed_build in path.parent.glob(f".{path.name}.*.partial") if alone else ():
                left_by_a_killed_build.unlink(missing_ok=True)
            write_whole(path, write)
    if (value := load(path)) is None:
        raise Failure(f"{path} was just written but does not read back; check the disk or set ATTNRES_CACHE elsewhere")
    return value


@contextmanager
def _alone(path: Path) -> Iterator[bool]:
    """Keeps others from building the entry, and says whether it can; without locks all build, each its own file."""
    with ExitStack() as stack:
        locked = True
        try:
            # The operating system frees this lock when its holder dies, so a killed build blocks nobody.
            stack.enter_context(FileLock(f"{path}.lock"))
        except (OSError, NotImplementedError) as error:
            if isinstance(error, OSError) and error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise
            locked = False
        yield locked


def write_text(file: BinaryIO, text: str) -> None:
    """Writes `text` as UTF-8."""
    file.write(text.encode())


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """A context in which what the system refuses is a Failure that names `path` and the mend."""
    try:
        yield
    except (OSError, NotImplementedError) as error:  # filelock's older versions, without locks
        reason = getattr(error, "strerror", None) or error
        raise Failure(f"cannot write {path} ({reason}); free space or use another folder (ATTNRES_CACHE)") from error
