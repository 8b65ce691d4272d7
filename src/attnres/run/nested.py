"""Nested Python values with tensors inside, as JSON beside a file of tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..errors import UsageError


def encode(value: Any, path: str, tensors: Tensors) -> Any:
    """`value` as JSON, its tensors put into `tensors`; what JSON lacks is an object with one key in underscores.

    `path` is what the value is called in tensor names and errors. Raises UsageError for a type that has no such form.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
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


def decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The value that `encode` was given, with the tensors of these names."""
    if isinstance(value, list):
        return [decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if "__tensor__" in value:
        return tensors[value["__tensor__"]]
    if "__tuple__" in value:
        return tuple(decode(item, tensors) for item in value["__tuple__"])
    if "__dict__" in value:
        return {decode(key, tensors): decode(item, tensors) for key, item in value["__dict__"]}
    return {key: decode(item, tensors) for key, item in value.items()}


class Tensors:
    """Tensors for one safetensors file; one that has several names is stored under the first."""

    def __init__(self) -> None:
        self.stored: dict[str, Tensor] = {}
        self._names: dict[tuple, str] = {}
        self._storages: set[int] = set()

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.stored.values())

    def add(self, name: str, tensor: Tensor) -> str:
        """The name that `tensor` is stored under."""
        memory = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if memory in self._names:
            return self._names[memory]
        while name in self.stored:
            name += "'"
        self._names[memory] = name
        copy = tensor.detach().cpu().contiguous()
        if copy.untyped_storage().data_ptr() in self._storages:
            copy = copy.clone()  # another view of memory that is stored already, which safetensors refuses
        self._storages.add(copy.untyped_storage().data_ptr())
        self.stored[name] = copy
        return name
