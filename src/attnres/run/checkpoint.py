"""Checkpoints that are whole or absent, whatever happens while one is written.

A checkpoint is a folder root/step-00000100 of model.safetensors, optimizer.safetensors (the tensors of the optimizer
and of the run's state) and state.json (everything else, with the size and SHA-256 of the other two). It is written into
a hidden folder beside it, synced to the disk and renamed at the end; it leaves by a rename as well, so a kill at any
moment leaves no half of it under its own name. Nothing is pickled: reading a checkpoint cannot run code.
"""

import fcntl
import hashlib
import json
import logging
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .. import json_text
from ..errors import Failure, UsageError
from ..files import opened_if_regular, read, sync
from .nested import Tensors, decode, encode
from .rng import rng_state, set_rng_state

__all__ = ["Checkpoint", "check_compatible", "latest", "load", "rng_state", "save", "set_rng_state"]

LOGGER = logging.getLogger(__name__)

MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"
METADATA = ".metadata"  # of a sharded one: torch's pickle of what lies where
PLAIN, SHARDED = 1, 2

# ".previous" is what a checkpoint of the same step is called while its successor takes the name
_CHECKPOINT = re.compile(r"step-\d{8,}(\.previous)?", re.ASCII)
_SAVING, _REMOVING = ".saving-", ".removing-"


class Checkpoint(NamedTuple):
    """What `load` returns."""

    model_tensors: dict[str, Tensor]
    optimizer_state: Any
    state: dict[str, Any]
    step: int


def save(
    root: str | Path,
    step: int,
    model_tensors: dict[str, Tensor],
    optimizer_state: Any,
    state: dict[str, Any],
    keep: int,
) -> Path:
    """Writes root/step-<step>, then removes checkpoints of earlier steps until `keep` are left, this one included.

    `optimizer_state` and `state` may nest dicts, lists, tuples, strings, numbers, booleans, None and tensors; they come
    back as they are. Names that share one tensor (tied weights) still share it after loading. Folders that killed runs
    left behind are swept away first. Raises Failure if the disk does not take it all, with every earlier checkpoint in
    place, and UsageError for values that cannot be stored.
    """
    if step < 0 or keep < 1:
        raise UsageError(f"step must be >= 0 and keep at least 1; they are {step} and {keep}")
    model, others = Tensors(), Tensors()
    manifest = {
        "format": PLAIN,
        "step": step,
        "model": {name: model.add(name, tensor) for name, tensor in model_tensors.items()},
        "state": encode(state, "state", others),
        "optimizer": encode(optimizer_state, "optimizer", others),
    }
    try:
        with new_checkpoint(root, step, keep) as scratch:
            _write(scratch, manifest, model, others)
    except (OSError, SafetensorError) as error:
        raise Failure(
            f"cannot save step {step} under {root}: {_reason(error)}; make it writable with "
            f"{1 + (model.nbytes + others.nbytes) // 10**6} MB free (earlier checkpoints are untouched)"
        ) from error
    return checkpoint_folder(root, step)


def checkpoint_folder(root: str | Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return Path(root) / f"step-{step:08d}"


@contextmanager
def new_checkpoint(root: str | Path, step: int, keep: int) -> Iterator[Path]:
    """A hidden folder that becomes root/step-<step> at the end; earlier checkpoints then go until `keep` are left.

    After an error it is gone, and every earlier checkpoint in place. Folders that killed runs left behind are swept
    away first.
    """
    folder = checkpoint_folder(root, step)
    previous = folder.with_name(folder.name + ".previous")
    folder.parent.mkdir(parents=True, exist_ok=True)
    _sweep(folder.parent)
    with _scratch_folder(folder) as scratch:
        yield scratch
        if folder.exists():
            _remove(previous)
            os.rename(folder, previous)
        os.rename(scratch, folder)
    sync(folder.parent)
    _remove(previous)
    earlier = [path for path in _newest_first(folder.parent) if _step(path) < step]
    for path in earlier[keep - 1 :]:
        _remove(path)


def latest(root: str | Path) -> Path | None:
    """The newest whole checkpoint under `root`; damaged ones are passed over with a warning in the log."""
    for path in _newest_first(Path(root)):
        try:
            _verify(path)
        except Failure as failure:
            LOGGER.warning("%s; trying the checkpoint before it", failure)
        else:
            return path
    return None


def load(path: str | Path, map_location: str | torch.device = "cpu") -> Checkpoint:
    """Reads a checkpoint folder, its tensors onto `map_location`, bit for bit as they were saved.

    Raises UsageError if `path` is no checkpoint folder and Failure, which names the file, if one is damaged.
    """
    path = Path(path)
    if not any(os.path.exists(path / name) for name in (MODEL, OPTIMIZER, STATE, METADATA)):
        raise UsageError(f"{path} is not a checkpoint; give a folder such as OUT/checkpoints/step-00000100")
    try:
        manifest = _verify(path)
        if manifest["format"] == SHARDED:
            from .sharded import load_whole

            return load_whole(path, manifest, map_location)
        stored = _read_tensors(path / MODEL, map_location)
        others = _read_tensors(path / OPTIMIZER, map_location)
    except Failure as failure:
        whole = latest(path.parent)
        mend = f"use {whole} instead" if whole else f"no whole checkpoint is left in {path.parent}, so start anew"
        raise Failure(f"{failure}; {mend}") from failure
    model = {name: stored[first_name] for name, first_name in manifest["model"].items()}
    state, optimizer_state = (decode(manifest[key], others) for key in ("state", "optimizer"))
    return Checkpoint(model, optimizer_state, state, manifest["step"])


def check_compatible(saved_config: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Raises UsageError, which names every differing field with both values, unless the configurations are equal.

    Both are nested mappings of JSON values; lists and tuples count as equal.
    """
    saved, own = flat(saved_config), flat(config)
    different = [
        f"{field} ({saved.get(field, 'absent')} in the checkpoint, {own.get(field, 'absent')} now)"
        for field in [*saved, *(field for field in own if field not in saved)]
        if field not in own or field not in saved or saved[field] != own[field]
    ]
    if different:
        raise UsageError(
            f"the checkpoint has another configuration: {', '.join(different)}; "
            "resume with its values or start a new run"
        )


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Dotted field names with their values as JSON text."""
    fields: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            fields.update(flat(value, f"{prefix}{key}."))
        else:
            fields[f"{prefix}{key}"] = json.dumps(value)
    return fields


def _newest_first(root: Path) -> list[Path]:
    try:
        found = [path for path in root.iterdir() if _CHECKPOINT.fullmatch(path.name)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise Failure(f"{root} cannot be read: {_reason(error)}; allow reading it") from error
    return sorted(found, key=lambda path: (_step(path), not path.suffix), reverse=True)


def _step(path: Path) -> int:
    return int(path.stem.removeprefix("step-"))


@contextmanager
def _scratch_folder(folder: Path) -> Iterator[Path]:
    """A folder to build `folder` in, gone at the end unless renamed; locked, so that `_sweep` sees it is in use."""
    scratch = folder.with_name(f"{_SAVING}{folder.name}-{secrets.token_hex(4)}")
    scratch.mkdir()
    lock = os.open(scratch, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks, where nothing is swept either
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        os.close(lock)


def _sweep(root: Path) -> None:
    """Deletes what killed runs left half written or half removed."""
    for path in root.iterdir():
        if path.name.startswith((_SAVING, _REMOVING)):
            with suppress(OSError):  # in use, or already swept by another run
                lock = os.open(path, os.O_RDONLY)
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(path, ignore_errors=True)
                finally:
                    os.close(lock)


def _remove(path: Path) -> None:
    """Takes the name away first and for good, so that what is left of a deletion cannot pass for a checkpoint."""
    grave = path.with_name(f"{_REMOVING}{path.name}-{secrets.token_hex(4)}")
    try:
        os.rename(path, grave)
        sync(path.parent)
        shutil.rmtree(grave)
    except FileNotFoundError:
        pass
    except OSError as error:
        LOGGER.warning("cannot remove %s, an outdated checkpoint: %s; remove it by hand", path, _reason(error))


def _write(folder: Path, manifest: dict[str, Any], model: Tensors, others: Tensors) -> None:
    readers = folder.stat().st_mode & 0o666
    manifest["files"] = {}
    for name, tensors in ((MODEL, model), (OPTIMIZER, others)):
        file = folder / name
        save_file(tensors.stored, file, metadata={"format": "pt"})
        file.chmod(readers)  # safetensors makes files for their owner alone, whatever the umask says
        sync(file)
        manifest["files"][name] = {"bytes": file.stat().st_size, "sha256": sha256(file)}
    write_manifest(folder, manifest)


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Writes state.json, which names every other file of the checkpoint and so comes last."""
    manifest["sha256"] = _checksum(manifest)
    (folder / STATE).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    sync(folder / STATE)
    sync(folder)


def read_manifest(path: Path) -> dict[str, Any]:
    """The contents of state.json of a whole checkpoint; Failure names the file that is damaged."""
    return _verify(path)


def _verify(path: Path) -> dict[str, Any]:
    """The contents of state.json, once all files are known to be whole; Failure names the one that is not."""
    file = path / STATE
    try:
        manifest = json_text.parse_object(read(file))
        if manifest.pop("sha256") != _checksum(manifest):
            raise ValueError("its checksum differs")
        if manifest["format"] not in (PLAIN, SHARDED):
            raise Failure(f"{file} has format {manifest['format']}, this version of attnres reads 1 and 2")
        for name, recorded in manifest["files"].items():
            file = path / name
            if (size := file.stat().st_size) != recorded["bytes"]:
                raise ValueError(f"{size} of {recorded['bytes']} bytes")
            if "sha256" in recorded and sha256(file) != recorded["sha256"]:
                raise ValueError("its checksum differs")
    except OSError as error:
        raise Failure(f"{file} cannot be read: {_reason(error)}") from error
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise Failure(f"{file} is damaged: {error}") from error
    return manifest


def _read_tensors(file: Path, device: str | torch.device) -> dict[str, Tensor]:
    try:
        with safe_open(file, framework="pt") as tensors:
            # copied, since these are views of the file, mapped into memory, and a run may soon remove it
            return {name: tensors.get_tensor(name).to(device, copy=True) for name in tensors.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise Failure(f"{file} cannot be read: {_reason(error)}") from error


def _checksum(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def sha256(file: Path) -> str:
    """The checksum of a file's contents, in hexadecimal."""
    with open(file, "rb", opener=opened_if_regular) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
