"""Nested Python values with tensors inside, as JSON beside a file of tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from ..errors import UsageError
from ..parallel.weights import Pieces

Piece = tuple[str, tuple[int, ...]]
"""Which piece of which tensor: the name that it is stored under, and its offset."""


def encode(value: Any, path: str, tensors: Tensors) -> Any:
    """`value` as JSON, its tensors put into `tensors`; what JSON lacks is an object with one key in underscores.

    `path` is what the value is called in tensor names and errors. Raises UsageError for a type that has no such form.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor | Pieces):
        return {"__tensor__": tensors.add(path, value)}
    if isinstance(value, list | tuple):
        items = [encode(item, f"{path}/{i}", tensors) for i, item in enumerate(value)]
        return items if isinstance(value, list) else {"__tuple__": items}
    if isinstance(value, dict):
        if all(isinstance(key, str) and not key.startswith("__") for key in value):
            return {key: encode(item, f"{path}/{key}", tensors) for key, item in value.items()}
        return {"__dict__": [[encode(k, path, tensors), encode(v, f"{path}/{k}", tensors)] for k, v in value.items()]}
    raise UsageError(
        f"{path} is a {type(value).__name__}, which a checkpoint cannot hold; turn it into tensors, numbers, strings, "
        "lists, tuples and dicts"
    )


def decode(value: Any, tensor: Callable[[str], Tensor]) -> Any:
    """The value that `encode` was given, `tensor` gives the tensor of a name."""
    if isinstance(value, list):
        return [decode(item, tensor) for item in value]
    if not isinstance(value, dict):
        return value
    if "__tensor__" in value:
        return tensor(value["__tensor__"])
    if "__tuple__" in value:
        return tuple(decode(item, tensor) for item in value["__tuple__"])
    if "__dict__" in value:
        return {decode(key, tensor): decode(item, tensor) for key, item in value["__dict__"]}
    return {key: decode(item, tensor) for key, item in value.items()}


class Tensors:
    """Tensors for one safetensors file, or pieces of them; one that has several names is stored under the first."""

    def __init__(self) -> None:
        self.stored: dict[str, Pieces] = {}
        self._names: dict[tuple, str] = {}

    def add(self, name: str, tensor: Tensor | Pieces) -> str:
        """The name that `tensor` is stored under."""
        pieces = tensor if isinstance(tensor, Pieces) else Pieces(tuple(tensor.shape), [((0,) * tensor.dim(), tensor)])
        memory = tuple((t.device, t.data_ptr(), t.dtype, t.shape, t.stride()) for _, t in pieces.held)
        if memory in self._names:
            return self._names[memory]
        while name in self.stored:
            name += "'"
        self._names[memory] = name
        self.stored[name] = pieces
        return name

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for pieces in self.stored.values() for _, tensor in pieces.held)

    def sizes(self) -> dict[Piece, tuple[int, float]]:
        """Bytes of every piece, and its value if it is a scalar."""
        return {
            (name, offset): (tensor.nbytes, 0.0 if tensor.dim() else float(tensor))
            for name, pieces in self.stored.items()
            for offset, tensor in pieces.held
        }

    def write(self, file: Path, share: Iterable[Piece]) -> dict[str, tuple[tuple[int, ...], list[Any]]]:
        """Writes these pieces; returns of each tensor the whole's shape and every piece's file, offset, shape."""
        storages: set[int] = set()
        copies: dict[str, Tensor] = {}
        written: dict[str, tuple[tuple[int, ...], list[Any]]] = {}
        for name, offset in share:
            copy = dict(self.stored[name].held)[offset].detach().cpu().contiguous()
            if copy.untyped_storage().data_ptr() in storages:
                copy = copy.clone()  # another view of memory that is written already, which safetensors refuses
            storages.add(copy.untyped_storage().data_ptr())
            copies[key_of(name, offset)] = copy
            written.setdefault(name, (self.stored[name].shape, []))[1].append((file.name, offset, tuple(copy.shape)))
        save_file(copies, file, metadata={"format": "pt"})
        return written


def key_of(name: str, offset: tuple[int, ...]) -> str:
    """What a piece is called in its file."""
    return f"{name}[{', '.join(map(str, offset))}]" if any(offset) else name
