"""Reading checkpoints of any format: whether a folder is whole, and any region of any tensor in it.

Format 3 is `checkpoint`'s. Format 1 is that of single processes before it: each tensor lies whole in one of the two
files. Format 2 is torch.distributed.checkpoint's, which many processes wrote (`old_sharded`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .. import json_text
from ..errors import Failure
from ..files import opened_if_regular, read
from ..parallel.weights import Pieces
from . import old_sharded
from .nested import decode, key_of

MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"


class Piece(NamedTuple):
    """A piece of a tensor on disk: its place in the whole tensor, and how to read it."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]
    read: Callable[[], Tensor]


class Stored:
    """A checkpoint that `verify` has found whole.

    manifest: the contents of its state.json. Reading raises Failure, which names the file, for one that is damaged
    after all.
    """

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path, self.step = path, int(manifest["step"])
        self._files: dict[str, Any] = {}
        self._tensors: dict[str, dict[str, tuple[tuple[int, ...], list[Piece]]]]
        if manifest["format"] == 2:
            tensors, names = old_sharded.tensors(path, manifest)
            self._tensors = {
                k: {n: (s, [Piece(*p) for p in ps]) for n, (s, ps) in of.items()} for k, of in tensors.items()
            }
            manifest = {**manifest, **names}
        elif manifest["format"] == 1:
            self._tensors = {
                kind: {name: self._whole(kind, name) for name in self._open(kind).keys()}  # noqa: SIM118
                for kind in (MODEL, OPTIMIZER)
            }
        else:
            self._tensors = {
                kind: {
                    name: (tuple(shape), [self._piece(name, *piece) for piece in pieces])
                    for name, (shape, pieces) in tensors.items()
                }
                for kind, tensors in manifest["tensors"].items()
            }
        self._manifest = manifest

    def state(self) -> Any:
        """The state of the run that was saved."""
        return decode(self._manifest["state"], self._reader(OPTIMIZER, "cpu"))

    def model(self, device: str | torch.device) -> dict[str, Tensor]:
        """The tensors of the whole model by name."""
        tensor = self._reader(MODEL, device)
        return {name: tensor(stored) for name, stored in self._manifest["model"].items()}

    def optimizer(self, device: str | torch.device) -> Any:
        """The whole optimizer's state."""
        return decode(self._manifest["optimizer"], self._reader(OPTIMIZER, device))

    def fill_model(self, name: str, own: Pieces) -> None:
        """Copies into a process's pieces of a tensor of the model what is stored there."""
        self._fill(MODEL, self._manifest["model"].get(name, name), own)

    def fill_state(self, name: str, own: Pieces) -> None:
        """The same for a tensor of the optimizer's state, of which `kept` gives the name."""
        self._fill(OPTIMIZER, name, own)

    def kept(self, owner: str, parameter: str) -> dict[str, str]:
        """The names of what is stored of a parameter's state in an optimizer, by key."""
        values = self._manifest["optimizer"].get(owner, {}).get(parameter, {})
        return {key: value["__tensor__"] for key, value in values.items()}

    def scalar(self, name: str) -> Tensor | None:
        """A tensor of the optimizer's state if it is a scalar."""
        shape, pieces = self._tensors[OPTIMIZER][name]
        return None if shape else pieces[0].read().clone()

    def _fill(self, kind: str, name: str, own: Pieces) -> None:
        if self._tensors[kind].get(name, (None,))[0] != own.shape:
            raise Failure(f"{self.path} is damaged: it holds no {name} of shape {list(own.shape)}")
        for offset, tensor in own.held:
            for piece in self._tensors[kind][name][1]:
                copy_overlap(tensor, offset, piece)

    def _reader(self, kind: str, device: str | torch.device) -> Callable[[str], Tensor]:
        done: dict[str, Tensor] = {}

        def tensor(name: str) -> Tensor:
            if name not in done:
                shape, pieces = self._tensors[kind][name]
                whole = torch.zeros(shape, dtype=pieces[0].read().dtype)
                for piece in pieces:
                    copy_overlap(whole, (0,) * len(shape), piece)
                done[name] = whole.to(device)
            return done[name]

        return tensor

    def _open(self, name: str) -> Any:
        if name not in self._files:
            try:
                self._files[name] = safe_open(self.path / name, framework="pt")
            except (OSError, SafetensorError) as error:
                raise Failure(f"{self.path / name} cannot be read: {reason(error)}") from error
        return self._files[name]

    def _read(self, file: str, key: str) -> Tensor:
        try:
            return self._open(file).get_tensor(key)  # a view of the file, mapped into memory
        except SafetensorError as error:
            raise Failure(f"{self.path / file} cannot be read: {reason(error)}") from error

    def _whole(self, file: str, name: str) -> tuple[tuple[int, ...], list[Piece]]:
        shape = tuple(self._open(file).get_slice(name).get_shape())
        return shape, [Piece((0,) * len(shape), shape, partial(self._read, file, name))]

    def _piece(self, name: str, file: str, offset: list[int], shape: list[int]) -> Piece:
        return Piece(tuple(offset), tuple(shape), partial(self._read, file, key_of(name, tuple(offset))))


@torch.no_grad()
def copy_overlap(own: Tensor, offset: tuple[int, ...], piece: Piece) -> None:
    """Copies what `own`, which lies at `offset` in the whole tensor, has in common with a piece of that."""
    to, source = [], []
    for begin, size, other, length in zip(offset, own.shape, piece.offset, piece.shape, strict=True):
        first, last = max(begin, other), min(begin + size, other + length)
        if first >= last:
            return
        to.append(slice(first - begin, last - begin))
        source.append(slice(first - other, last - other))
    own[tuple(to)].copy_(piece.read()[tuple(source)])


def verify(path: Path, number: int = 0, of: int = 1) -> dict[str, Any]:
    """The contents of state.json, once all files are known to be whole; Failure names the one that is not.

    Of `of` processes each gives its `number` and reads its share of the files; all look at their sizes.
    """
    file = path / STATE
    try:
        manifest = json_text.parse_object(read(file))
        if manifest.pop("sha256") != checksum(manifest):
            raise ValueError("its checksum differs")
        if manifest["format"] not in (1, 2, 3):
            raise Failure(f"{file} has format {manifest['format']}, this version of attnres reads 1 to 3")
        for i, (name, recorded) in enumerate(manifest["files"].items()):
            file = path / name
            if (size := file.stat().st_size) != recorded["bytes"]:
                raise ValueError(f"{size} of {recorded['bytes']} bytes")
            if i % of == number and "sha256" in recorded and sha256(file) != recorded["sha256"]:
                raise ValueError("its checksum differs")
    except OSError as error:
        raise Failure(f"{file} cannot be read: {reason(error)}") from error
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise Failure(f"{file} is damaged: {error}") from error
    return manifest


def checksum(manifest: Mapping[str, Any]) -> str:
    """Of the contents of a state.json but for this."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def sha256(file: Path) -> str:
    """The checksum of a file's contents, in hexadecimal."""
    with open(file, "rb", opener=opened_if_regular) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def reason(error: Exception) -> str:
    """What the system or safetensors says."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
