"""Checkpoints that many processes wrote in earlier versions (format 2): the files of torch.distributed.checkpoint.

Their table of contents, .metadata, is a pickle. It is read with an unpickler that knows a few names and makes plain
records of them, and the tensors with torch's weights-only one: no code in the files is run.
"""

from __future__ import annotations

import io
import pathlib
import pickle
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import Failure
from ..files import read
from ..model import DecoderConfig
from ..parallel.weights import EMBEDDING, HEAD

METADATA = ".metadata"

Place = tuple[tuple[int, ...], tuple[int, ...], Callable[[], Tensor]]
"""Offset in the whole tensor, shape, and how to read it."""
Tensors = dict[str, tuple[tuple[int, ...], list[Place]]]
"""Name -> shape of the whole, its pieces."""


def tensors(path: Path, manifest: dict[str, Any]) -> tuple[dict[str, Tensors], dict[str, Any]]:
    """The tensors in a checkpoint by the file that would hold them today, and their names as state.json has them today.

    A parameter of the residual connection was stored row by row, as NAME.ROW. Raises Failure for a damaged .metadata.
    """
    config = DecoderConfig.from_dict(manifest["state"]["config"]["model"])
    with torch.device("meta"):
        residual = config.build_residual()
        counts = {f"residual.{name}": len(residual.get_parameter(name)) for name in residual.layer_parameters}
    model: Tensors = {}
    state: Tensors = {}
    optimizer: dict[str, dict[str, dict[str, dict[str, str]]]] = {}
    for stored, shape, pieces in _contents(path):
        kind, *rest = stored.split("/")
        name = rest[0 if kind == "model" else 1]
        stacked, _, row = name.rpartition(".")
        is_row = stacked in counts
        name = stacked if is_row else name
        if is_row and shape:
            shape = (counts[name], *shape)
            pieces = [((int(row), *offset), (1, *size), partial(_as_row, read)) for offset, size, read in pieces]
        if kind == "model":
            model.setdefault(name, (shape, []))[1].extend(pieces)
            continue
        owner, _, key = rest
        today = f"optimizer/{owner}/{name}/{key}"
        optimizer.setdefault(owner, {}).setdefault(name, {})[key] = {"__tensor__": today}
        known = state.setdefault(today, (shape, []))[1]
        if is_row and not shape:  # a row without gradients stayed behind in its count of steps
            pieces = [max([*known, *pieces], key=lambda piece: piece[2]().item())]
            known.clear()
        known.extend(pieces)
    names = {name: name for name in model} | ({HEAD: EMBEDDING} if config.tie_word_embeddings else {})
    return {"model.safetensors": model, "optimizer.safetensors": state}, {"model": names, "optimizer": optimizer}


def _contents(path: Path) -> Iterator[tuple[str, tuple[int, ...], list[Place]]]:
    """Name, shape and pieces of every tensor in the files of torch.distributed.checkpoint."""
    file = path / METADATA
    try:
        metadata = _Unpickler(io.BytesIO(read(file))).load()
        places = {(index.fqn, tuple(index.offset or ())): place for index, place in metadata.storage_data.items()}
        for name, stored in metadata.state_dict_metadata.items():
            pieces: list[Place] = []
            for chunk in stored.chunks:
                place, offset = places[name, tuple(chunk.offsets)], tuple(chunk.offsets)
                pieces.append((offset, tuple(chunk.sizes), partial(_read, path / place.relative_path, place)))
            yield name, tuple(stored.size), pieces
    except OSError as error:
        raise Failure(f"{file} cannot be read: {error.strerror}; put --out on a shared disk") from error
    except Exception as error:  # whatever a damaged pickle leads to
        raise Failure(f"{file} is damaged: {error}") from error


def _read(file: Path, place: Any) -> Tensor:
    try:
        with open(file, "rb") as stream:
            stream.seek(place.offset)
            return torch.load(io.BytesIO(stream.read(place.length)), map_location="cpu", weights_only=True)
    except Exception as error:  # of the system, zipfile or pickle
        raise Failure(f"{file.parent} is damaged: {file.name}: {str(error).partition(chr(10))[0]}") from error


def _as_row(read: Callable[[], Tensor]) -> Tensor:
    return read()[None]


class _Record:
    """Stands for every class of torch.distributed.checkpoint: what was pickled of it are attributes."""

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        for values in state if isinstance(state, tuple) else (state,):  # (its dict, its slots)
            if isinstance(values, dict):
                self.__dict__.update(values)

    def __hash__(self) -> int:
        return id(self)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("torch.distributed.checkpoint."):
            return _Record
        if module == "torch" and (name == "Size" or isinstance(getattr(torch, name, None), torch.dtype)):
            return getattr(torch, name)
        if (module, name) == ("torch.serialization", "_get_layout"):
            return str
        if module.startswith("pathlib") and name.endswith("Path"):
            return pathlib.PurePosixPath
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no table of contents needs")
