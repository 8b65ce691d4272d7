"""Checkpoints that are whole or absent, whatever happens while one is written, by one process or many.

A checkpoint is a folder root/step-00000100 of the tensors, in safetensors files, and state.json, which holds everything
else, says which piece of which tensor lies where, and has the size and SHA-256 of every other file. One process writes
model.safetensors and optimizer.safetensors (the tensors of the optimizer and of the run's state); each of many writes
model-RANK.safetensors and optimizer-RANK.safetensors with the pieces that it holds. Names are the whole model's, so any
other number of processes reads what it needs (`stored`). The folder is written under a hidden name, synced to the disk
and renamed at the end; it leaves by a rename as well, so a kill at any moment leaves no half of it under its own name.
Nothing is pickled: reading a checkpoint cannot run code.

All processes of a job call these functions together, on a disk that all see; all return or raise the same.
"""

import fcntl
import json
import logging
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor

from ..errors import Failure, UsageError
from ..files import sync
from ..model.decoder import Backbone
from ..parallel.agreement import gathered, on_all, on_first, processes, rank
from ..parallel.weights import EMBEDDING, HEAD, own_piece, own_pieces, own_state
from .nested import Piece, Tensors, encode
from .old_sharded import METADATA
from .rng import rng_state, set_rng_state
from .stored import MODEL, OPTIMIZER, STATE, Stored, checksum, reason, sha256, verify

__all__ = ["Checkpoint", "latest", "load", "rng_state", "save", "set_rng_state"]

LOGGER = logging.getLogger(__name__)

FORMAT = 3

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
    model_tensors: Any,
    optimizer_state: Any,
    state: dict[str, Any],
    keep: int,
) -> Path:
    """Writes root/step-<step>, then removes checkpoints of earlier steps until `keep` are left, this one included.

    `model_tensors` are tensors, or `Pieces` of them, by name. `optimizer_state` and `state` may nest dicts, lists,
    tuples, strings, numbers, booleans, None, tensors and `Pieces`; they come back as they are. Of many processes each
    gives what it holds, in nested dicts under the names of the whole, and the first one's state is saved. Names that
    share one tensor (tied weights) still share it after loading. Folders that killed runs left behind are swept away
    first. Raises Failure if the disk does not take it all, with every earlier checkpoint in place, and UsageError for
    values that cannot be stored.
    """
    if step < 0 or keep < 1:
        raise UsageError(f"step must be >= 0 and keep at least 1; they are {step} and {keep}")
    tensors = {MODEL: Tensors(), OPTIMIZER: Tensors()}
    own = {
        "model": {name: tensors[MODEL].add(name, tensor) for name, tensor in model_tensors.items()},
        "optimizer": encode(optimizer_state, "optimizer", tensors[OPTIMIZER]),
        "state": encode(state, "state", tensors[OPTIMIZER]) if rank() == 0 else {},
    }
    every = gathered((own, {kind: tensors[kind].sizes() for kind in tensors}))
    manifest = {"format": FORMAT, "step": step, **_merged([values for values, _ in every])}
    share = {kind: _shares([sizes[kind] for _, sizes in every])[rank()] for kind in tensors}

    def told(action: Any) -> Any:
        try:
            return action()
        except (OSError, SafetensorError) as error:
            raise Failure(
                f"cannot save step {step} under {root}: {reason(error)}; make it writable with "
                f"{1 + sum(held.nbytes for held in tensors.values()) // 10**6} MB free (earlier checkpoints are "
                "untouched)"
            ) from error

    with ExitStack() as stack:
        scratch = on_first(lambda: told(lambda: stack.enter_context(_new_checkpoint(root, step, keep))))
        written = gathered(on_all(lambda: told(lambda: _write(scratch, tensors, share))))

        def finish() -> None:
            _write_manifest(scratch, manifest, written)
            stack.close()

        on_first(lambda: told(finish))
    return Path(root) / _name(step)


def save_run(
    root: Path, step: int, parts: Sequence[Backbone], optimizer: Any, state: dict[str, Any], keep: int
) -> Path:
    """`save` of a model and its optimizer, of which this process holds `parts`."""
    model = own_pieces(parts)
    if EMBEDDING in model and parts[0].config.tie_word_embeddings:
        model[HEAD] = model[EMBEDDING]
    return save(root, step, model, own_state(parts, optimizer.state_dict()), state, keep)


def latest(root: str | Path) -> Path | None:
    """The newest whole checkpoint under `root`; damaged ones are passed over with a warning in the log."""
    for path in on_first(lambda: _newest_first(Path(root))):
        try:
            _verified(path)
        except Failure as failure:
            if rank() == 0:
                LOGGER.warning("%s; trying the checkpoint before it", failure)
        else:
            return path
    return None


def opened(path: str | Path) -> Stored:
    """A checkpoint folder, known to be whole.

    Raises UsageError if `path` is no checkpoint folder and Failure, which names the file, if one is damaged.
    """
    path = Path(path)
    if not is_checkpoint(path):
        raise UsageError(f"{path} is not a checkpoint; give a folder such as OUT/checkpoints/step-00000100")
    with _telling_another(path):
        return Stored(path, _verified(path))


def load(path: str | Path, map_location: str | torch.device = "cpu") -> Checkpoint:
    """Reads a checkpoint folder, its tensors onto `map_location`, whole and bit for bit as they were saved.

    Raises what `opened` raises.
    """
    stored = opened(path)
    with _telling_another(Path(path)):
        return Checkpoint(stored.model(map_location), stored.optimizer(map_location), stored.state(), stored.step)


def restore(stored: Stored, parts: Sequence[Backbone], optimizer: Any) -> None:
    """Copies what this process holds of the model, and of the optimizer's state, out of a checkpoint.

    Raises Failure in all processes if a file is damaged.
    """
    with _telling_another(stored.path):
        on_all(lambda: _restore(stored, parts, optimizer))


def export(path: Path, folder: Path) -> None:
    """Writes model.safetensors, the weights of the whole model in the checkpoint `path`, into `folder`.

    Raises Failure if the checkpoint is damaged or the folder cannot be written.
    """
    weights = Tensors()
    for name, tensor in opened(path).model("cpu").items():
        weights.add(name, tensor)
    try:
        weights.write(folder / MODEL, weights.sizes())
    except (OSError, SafetensorError) as error:
        raise Failure(
            f"cannot write {folder / MODEL}, the whole model out of the parts in {path}: {error}; set "
            "TMPDIR to a folder with space for it"
        ) from error


def is_checkpoint(path: Path) -> bool:
    """Whether files of a checkpoint lie in this folder."""
    return any(os.path.exists(path / name) for name in (STATE, METADATA)) or any(path.glob("*.safetensors"))


@contextmanager
def _new_checkpoint(root: str | Path, step: int, keep: int) -> Iterator[Path]:
    """A hidden folder that becomes root/step-<step> at the end; earlier checkpoints then go until `keep` are left.

    After an error it is gone, and every earlier checkpoint in place. Folders that killed runs left behind are swept
    away first.
    """
    folder = Path(root) / _name(step)
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


def _newest_first(root: Path) -> list[Path]:
    try:
        found = [path for path in root.iterdir() if _CHECKPOINT.fullmatch(path.name)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise Failure(f"{root} cannot be read: {reason(error)}; allow reading it") from error
    return sorted(found, key=lambda path: (_step(path), not path.suffix), reverse=True)


def _name(step: int) -> str:
    return f"step-{step:08d}"


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
        LOGGER.warning("cannot remove %s, an outdated checkpoint: %s; remove it by hand", path, reason(error))


def _restore(stored: Stored, parts: Sequence[Backbone], optimizer: Any) -> None:
    for part in parts:
        for name, own in own_pieces([part]).items():
            stored.fill_model(name, own)
    holders = {name: part for part in parts for name, _ in part.named_parameters()}
    state: dict[str, dict[str, dict[str, Tensor]]] = {}
    for owner, parameters in optimizer.state_dict().items():
        for name in parameters:
            part = holders[name]
            parameter = part.get_parameter(name)
            values = state.setdefault(owner, {}).setdefault(name, {})
            for key, kept in stored.kept(owner, own_piece(part, name, parameter)[0]).items():
                if (scalar := stored.scalar(kept)) is not None:
                    values[key] = scalar
                else:
                    values[key] = torch.zeros_like(parameter.detach())
                    stored.fill_state(kept, own_piece(part, name, values[key])[1])
    optimizer.load_state_dict(state)


def _merged(values: list[Any]) -> Any:
    """Nested dicts as one; of what two have the first counts."""
    if not isinstance(values[0], dict):
        return values[0]
    keys = dict.fromkeys(key for value in values for key in value)
    return {key: _merged([value[key] for value in values if key in value]) for key in keys}


def _shares(sizes: list[dict[Piece, tuple[int, float]]]) -> list[list[Piece]]:
    """What each process writes: a piece that several hold goes to the one with the least to write so far.

    A scalar comes from where it is largest: a row without gradients stays behind in its count of steps.
    """
    shares: list[list[Piece]] = [[] for _ in sizes]
    written = [0] * len(sizes)
    for piece in dict.fromkeys(piece for own in sizes for piece in own):
        holders = [number for number, own in enumerate(sizes) if piece in own]
        chosen = min(holders, key=lambda number: (-sizes[number][piece][1], written[number]))
        shares[chosen].append(piece)
        written[chosen] += sizes[chosen][piece][0]
    return shares


def _write(folder: Path, tensors: dict[str, Tensors], share: dict[str, list[Piece]]) -> tuple[Any, Any]:
    """Writes this process's files; returns their sizes and checksums, and what lies where in them."""
    readers = folder.stat().st_mode & 0o666
    files: dict[str, dict[str, Any]] = {}
    places: dict[str, Any] = {}
    for kind, of_kind in tensors.items():
        file = folder / (kind if processes() == 1 else kind.replace(".", f"-{rank()}."))
        places[kind] = of_kind.write(file, share[kind])
        file.chmod(readers)  # safetensors makes files for their owner alone, whatever the umask says
        sync(file)
        files[file.name] = {"bytes": file.stat().st_size, "sha256": sha256(file)}
    return files, places


def _write_manifest(folder: Path, manifest: dict[str, Any], written: list[tuple[Any, Any]]) -> None:
    """Writes state.json, which names every other file of the checkpoint and so comes last."""
    manifest["files"] = _merged([files for files, _ in written])
    manifest["tensors"] = {}
    for kind in (MODEL, OPTIMIZER):
        tensors = manifest["tensors"].setdefault(kind, {})
        for _, places in written:
            for name, (shape, pieces) in places[kind].items():
                tensors.setdefault(name, (shape, []))[1].extend(pieces)
    manifest["sha256"] = checksum(manifest)
    (folder / STATE).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    sync(folder / STATE)
    sync(folder)


def _verified(path: Path) -> dict[str, Any]:
    return on_all(lambda: verify(path, rank(), processes()))


@contextmanager
def _telling_another(path: Path) -> Iterator[None]:
    """A context in which a Failure also says which checkpoint beside this one is whole."""
    try:
        yield
    except Failure as failure:
        whole = latest(path.parent)
        mend = f"use {whole} instead" if whole else f"no whole checkpoint is left in {path.parent}, so start anew"
        raise Failure(f"{failure}; {mend}") from failure
