"""The C sources as a library: compiled at first use with the system's compiler, then kept in the user's cache.

A cache may be shared by unlike machines, so a library's name is a hash of all that it depends on: source, flags,
compiler, the processor's features. Its last bytes are a hash of the others: a file that is not whole is not loaded.
Where the cache cannot be used, each process compiles its own; where nothing can be compiled, the reason is what comes
back.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import torch

from ...files import default_cache_dir

SOURCE = Path(__file__).with_name("depth.c")
FLAGS = ("-std=gnu11", "-O2", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
"""Sums are vectors where the source says so; a flag that allows more, -ffast-math above all, would lose NaN."""
TYPES = {
    torch.float32: ("float32", "float", "float"),
    torch.bfloat16: ("bfloat16", "uint16_t", "float"),
    torch.float16: ("float16", "uint16_t", "float"),
    torch.float64: ("float64", "double", "double"),
}
"""What the source calls the type of a row's elements, what holds one, and what it is computed with."""
EXTRAS = (("-march=native", "-fopenmp"), ("-fopenmp",), ("-fopenmp-simd",))
"""Tried in this order: some compilers know no -march=native, some come without OpenMP."""
TIMEOUT = 120

_log = logging.getLogger("attnres")
_lock = threading.Lock()
_made: dict[torch.dtype, ctypes.CDLL | str] = {}


def library(dtype: torch.dtype) -> ctypes.CDLL | str:
    """The library for rows of `dtype`, or in a sentence why there is none; made once a process."""
    if dtype not in _made:
        with _lock:
            if dtype not in _made:
                _made[dtype] = _cached_or_compiled(*TYPES[dtype])
    return _made[dtype]


def _cached_or_compiled(*names: str) -> ctypes.CDLL | str:
    if os.name != "posix":
        return "the native backend is for Linux and other POSIX systems"
    compiler = shlex.split(os.environ.get("CC") or "cc")
    program = shutil.which(compiler[0])
    if program is None:
        return f"the native backend finds no C compiler {compiler[0]!r}; install one, such as gcc, or name it in CC"
    try:
        name = f"{names[0]}-{_identity(compiler, program)}.so"
        folder, refusal = _cache()
        if folder is not None and (made := _loaded(folder / name)) is not None:
            return made
        with tempfile.TemporaryDirectory(prefix="attnres-") as scratch:
            start = time.perf_counter()
            fresh = Path(scratch, name)
            if reason := _compile(compiler, names, fresh):
                tried = shlex.join(compiler)
                return f"the native backend could not be compiled with {tried} ({reason}); name another in CC"
            seconds = time.perf_counter() - start
            kept = None
            if folder is not None:
                try:
                    kept = _keep(fresh, folder / name)
                except OSError as error:
                    refusal = f"{folder} cannot be written ({error.strerror})"
            made = (kept and _loaded(kept)) or _loaded(fresh)
    except OSError as error:
        return f"the native backend could not be compiled ({error})"
    if made is None:
        return f"what {shlex.join(compiler)} makes of the native backend does not load; name another compiler in CC"
    if kept is None:
        _log.warning(
            "compiled the native backend for %s in %.1f s, for this process alone: %s", names[0], seconds, refusal
        )
    else:
        _log.info("compiled the native backend for %s in %.1f s, once: it is kept as %s", names[0], seconds, kept)
    return made


def _identity(compiler: list[str], program: str) -> str:
    """A hash of what a library depends on."""
    file = os.stat(os.path.realpath(program))
    parts = [*compiler, program, file.st_size, file.st_mtime_ns, FLAGS, _extras(), platform.machine(), _processor()]
    digest = hashlib.sha256(repr(parts).encode())
    digest.update(SOURCE.read_bytes())
    return digest.hexdigest()[:16]


def _processor() -> str:
    """What the system says of the first processor's kind and features; empty where it says nothing."""
    told = ("vendor_id", "cpu family", "model", "stepping", "flags", "Features", "CPU implementer", "CPU part", "isa")
    try:
        lines = Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines()
    except OSError:
        return ""
    return "\n".join(line for line in lines if line.partition(":")[0].strip() in told)


def _extras() -> tuple[tuple[str, ...], ...]:
    """A library for one processor needs a name that tells it from another's."""
    return EXTRAS if _processor() else EXTRAS[1:]


def _cache() -> tuple[Path | None, str]:
    """(a folder that nobody else can write to, or None; why there is none)."""
    folder = Path()
    try:
        folder = default_cache_dir() / "native"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
    except Exception as error:
        return None, f"the cache folder cannot be used ({error}); set ATTNRES_CACHE to a folder of your own"
    if found.st_uid != os.geteuid() or found.st_mode & 0o022:
        return None, f"{folder} can be written by others; set ATTNRES_CACHE to a folder of your own"
    return folder, ""


def _compile(compiler: list[str], names: tuple[str, ...], target: Path) -> str | None:
    """Compiles and seals the library; returns why it could not be."""
    reason = ""
    defined = [f"-D{macro}={name}" for macro, name in zip(("TYPE", "ELEMENT", "REAL"), names, strict=True)]
    for extras in _extras():
        command = [*compiler, *FLAGS, *extras, *defined, str(SOURCE), "-o", str(target), "-lm"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            return f"it was not ready after {TIMEOUT} s"
        if done.returncode == 0 and target.exists():
            with open(target, "ab") as file:
                file.write(hashlib.sha256(target.read_bytes()).digest())
            return None
        lines = done.stderr.strip().splitlines()
        reason = next((line for line in lines if "error" in line), f"exit status {done.returncode}")
    return reason


def _keep(fresh: Path, path: Path) -> Path:
    """Copies a library into the cache, whole or not at all."""
    descriptor, unfinished = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with open(descriptor, "wb") as file:
            file.write(fresh.read_bytes())
        os.replace(unfinished, path)
    except BaseException:
        os.unlink(unfinished)
        raise
    return path


def _loaded(path: Path) -> ctypes.CDLL | None:
    """The library in a file, or None unless it is ours, whole, and loads."""
    try:
        if path.stat().st_uid != os.geteuid():
            return None
        contents = path.read_bytes()
        if hashlib.sha256(contents[:-32]).digest() != contents[-32:]:
            return None
        return ctypes.CDLL(str(path))
    except OSError:
        return None
