"""Checkpoints of many processes: each writes its part, and any other number of processes reads what it needs.

The folder is that of a plain checkpoint, whole or absent, with the tensors in torch.distributed.checkpoint's files.
Tensors are named for the whole model, whatever the split: model/NAME and optimizer/OWNER/NAME/KEY, where a parameter of
the residual connection with a row a layer is saved row by row. Like torch's own reader, this one trusts the files.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, distributed
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor

from ..errors import Failure, UsageError
from ..model import DecoderConfig
from ..parallel.part import ModelPart
from ..parallel.weights import EMBEDDING, HEAD, copy_part, held_tensors, place, split_rows
from ..train.optim import Optimizers
from . import checkpoint

T = TypeVar("T")


def on_first(action: Callable[[], T]) -> T:
    """Runs `action` in the first process only; all return what it returned, or raise what it raised."""
    box: list[Any] = [None, None]
    if distributed.get_rank() == 0:
        try:
            box[0] = action()
        except (UsageError, Failure) as error:
            box[1] = error
        except OSError as error:
            box[1] = Failure(f"the first process failed: {error}")
    distributed.broadcast_object_list(box)
    if box[1] is not None:
        raise box[1]
    result: T = box[0]
    return result


def save(
    root: Path, step: int, parts: Sequence[ModelPart], optimizer: Optimizers, state: dict[str, Any], keep: int
) -> Path:
    """What `checkpoint.save` does, by all processes of a job together, on a disk that all see.

    state: JSON values, the first process's. Raises Failure in all of them if one cannot write, with every earlier
    checkpoint in place.
    """
    tensors = {f"model/{name}": tensor.detach() for name, tensor in _model_tensors(parts)}
    tensors |= dict(_optimizer_tensors(parts, optimizer))
    with ExitStack() as stack:
        scratch = on_first(lambda: stack.enter_context(checkpoint.new_checkpoint(root, step, keep)))
        try:
            dcp.save(tensors, storage_writer=dcp.FileSystemWriter(scratch))
        except CheckpointException as error:
            raise Failure(
                f"cannot save step {step} under {root}: {_reasons(error)} (earlier checkpoints are untouched)"
            ) from error

        def finish() -> None:
            # asked for by name: on a network disk a listing may lack what other machines have just written;
            # and from the file: what `save` returns lacks them on torch 2.11
            metadata = dcp.FileSystemReader(scratch).read_metadata()
            names = sorted({checkpoint.METADATA, *(stored.relative_path for stored in metadata.storage_data.values())})
            files: dict[str, dict[str, Any]] = {name: {"bytes": (scratch / name).stat().st_size} for name in names}
            files[checkpoint.METADATA]["sha256"] = checkpoint.sha256(scratch / checkpoint.METADATA)
            manifest = {"format": checkpoint.SHARDED, "step": step, "state": state, "files": files}
            checkpoint.write_manifest(scratch, manifest)
            stack.close()

        on_first(finish)
    return checkpoint.checkpoint_folder(root, step)


def load(path: Path, parts: Sequence[ModelPart], optimizer: Optimizers) -> tuple[dict[str, Any], int]:
    """Copies what this process holds out of a checkpoint, sharded or plain; returns the run's state and the step."""
    manifest = on_first(lambda: checkpoint.read_manifest(path))
    if manifest["format"] == checkpoint.PLAIN:
        return _load_plain(path, parts, optimizer)
    model = dict(_model_tensors(parts))
    tensors: dict[str, Tensor] = {f"model/{name}": tensor.detach() for name, tensor in model.items()}
    for key, stored in _metadata(path).items():
        kind, *rest = key.split("/")
        if kind == "optimizer" and rest[1] in model and isinstance(stored, TensorStorageMetadata):
            like = model[rest[1]].detach()
            same = stored.size == like.shape
            tensors[key] = torch.zeros_like(like) if same else torch.zeros(stored.size, dtype=stored.properties.dtype)
    _fill(tensors, path)
    if _is_tied_pair(parts):  # one name, two parameters
        place(parts[-1], [(EMBEDDING, _full(tensors[f"model/{EMBEDDING}"]))])
    _set_optimizer_state(parts, optimizer, {key: value for key, value in tensors.items() if key[0] == "o"})
    return manifest["state"], manifest["step"]


def load_whole(path: Path, manifest: dict[str, Any], device: str | torch.device) -> checkpoint.Checkpoint:
    """A sharded checkpoint as the plain checkpoint of a single process would be read."""
    model = _whole_model(path, manifest, device)
    state: dict[str, dict[str, dict[str, Tensor]]] = {}
    rows: dict[tuple[str, str, str], dict[int, Tensor]] = {}
    for path_of, tensor in _read(path, "optimizer", device).items():
        owner, name, key = path_of.split("/")
        stacked, _, row = name.rpartition(".")
        if name not in model and stacked in model:
            rows.setdefault((owner, stacked, key), {})[int(row)] = tensor
        else:
            state.setdefault(owner, {}).setdefault(name, {})[key] = tensor
    for (owner, name, key), held in rows.items():
        some, count = next(iter(held.values())), len(model[name])
        if some.dim() == 0:
            whole = max(held.values())
        else:  # a row that has had no gradient yet has no state
            whole = torch.stack([held.get(row, torch.zeros_like(some)) for row in range(count)])
        state.setdefault(owner, {}).setdefault(name, {})[key] = whole
    return checkpoint.Checkpoint(model, state, manifest["state"], manifest["step"])


def export(path: Path, folder: Path) -> None:
    """Writes model.safetensors, the weights of the whole model in the sharded checkpoint `path`, into `folder`.

    Raises Failure if the checkpoint is damaged or the folder cannot be written.
    """
    model = _whole_model(path, checkpoint.read_manifest(path), "cpu")
    if model.get(HEAD) is model[EMBEDDING]:
        del model[HEAD]
    try:
        save_file(model, folder / checkpoint.MODEL, metadata={"format": "pt"})
    except (OSError, SafetensorError) as error:
        raise Failure(
            f"cannot write {folder / checkpoint.MODEL}, the whole model out of the parts in {path}: {error}; set "
            "TMPDIR to a folder with space for it"
        ) from error


def _whole_model(path: Path, manifest: dict[str, Any], device: str | torch.device) -> dict[str, Tensor]:
    config = DecoderConfig.from_dict(manifest["state"]["config"]["model"])
    with torch.device("meta"):
        layer_parameters = [f"residual.{name}" for name in config.build_residual().layer_parameters]
    model = _read(path, "model", device)
    for name in layer_parameters:
        if rows := {int(key.rpartition(".")[2]): key for key in model if key.rpartition(".")[0] == name}:
            model[name] = torch.stack([model.pop(rows[row]) for row in sorted(rows)])
    if config.tie_word_embeddings:
        model[HEAD] = model[EMBEDDING]
    return model


def _read(path: Path, kind: str, device: str | torch.device) -> dict[str, Tensor]:
    """All tensors called kind/NAME of a checkpoint, by NAME."""
    tensors = {
        key: torch.empty(stored.size, dtype=stored.properties.dtype)
        for key, stored in _metadata(path).items()
        if isinstance(stored, TensorStorageMetadata) and key.startswith(f"{kind}/")
    }
    _fill(tensors, path, no_dist=True)
    return {key.removeprefix(f"{kind}/"): tensor.to(device) for key, tensor in tensors.items()}


def _metadata(path: Path) -> dict[str, Any]:
    """What torch has noted of every tensor, by name."""
    try:
        return dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    except OSError as error:
        raise Failure(
            f"{path / checkpoint.METADATA} cannot be read: {error.strerror}; put --out on a shared disk"
        ) from error


def _fill(tensors: dict[str, Tensor], path: Path, no_dist: bool = False) -> None:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
            dcp.load(tensors, storage_reader=dcp.FileSystemReader(path), no_dist=no_dist)
    except CheckpointException as error:
        raise Failure(f"{path} is damaged: {_reasons(error)}") from error


def _reasons(error: CheckpointException) -> str:
    """What went wrong in the processes, each thing once."""
    return "; ".join(sorted({str(failure).strip().partition("\n")[0] for failure, _ in error.failures.values()}))


def _model_tensors(parts: Sequence[ModelPart]) -> Iterator[tuple[str, Tensor]]:
    """What this process saves under its name in the whole model; of two tied copies the embedding."""
    seen = set()
    for part in parts:
        for own, tensor in held_tensors(part).items():
            name = EMBEDDING if own == HEAD and part.config.tie_word_embeddings else own
            if name not in seen:
                seen.add(name)
                yield name, tensor


def _is_tied_pair(parts: Sequence[ModelPart]) -> bool:
    first, last = parts[0], parts[-1]
    return first is not last and first.is_first and last.is_last and first.config.tie_word_embeddings


def _optimizer_tensors(parts: Sequence[ModelPart], optimizer: Optimizers) -> Iterator[tuple[str, Tensor]]:
    tied = parts[-1].config.tie_word_embeddings
    for owner, parameters in optimizer.state_dict().items():
        for own, values in parameters.items():
            if own == HEAD and tied and _is_tied_pair(parts):
                continue
            for key, value in values.items():
                yield f"optimizer/{owner}/{EMBEDDING if own == HEAD and tied else own}/{key}", value


def _set_optimizer_state(parts: Sequence[ModelPart], optimizer: Optimizers, tensors: dict[str, Tensor]) -> None:
    """Gives every parameter the tensors optimizer/OWNER/NAME/KEY, which are this process's parts of them."""
    tied = parts[-1].config.tie_word_embeddings
    by_name: dict[tuple[str, str], dict[str, Tensor]] = {}
    for path, tensor in tensors.items():
        _, owner, name, key = path.split("/")
        by_name.setdefault((owner, name), {})[key] = tensor
    state = {
        owner: {
            own: {
                key: value.clone()
                for key, value in by_name.get((owner, EMBEDDING if own == HEAD and tied else own), {}).items()
            }
            for own in parameters
        }
        for owner, parameters in optimizer.state_dict().items()
    }
    optimizer.load_state_dict(state)


def _load_plain(path: Path, parts: Sequence[ModelPart], optimizer: Optimizers) -> tuple[dict[str, Any], int]:
    saved = checkpoint.load(path)
    for part in parts:
        place(part, saved.model_tensors.items())
    model = dict(_model_tensors(parts))
    tensors: dict[str, Tensor] = {}
    for owner, parameters in saved.optimizer_state.items():
        for whole_name, values in parameters.items():
            for key, value in values.items():
                scalar = value.dim() == 0
                for part in parts:
                    pieces = split_rows(part, whole_name, saved.model_tensors[whole_name] if scalar else value)
                    for name, piece in pieces:
                        if name not in model:
                            continue
                        own = value.clone() if scalar else torch.zeros_like(model[name].detach())
                        if not scalar:
                            copy_part(own, piece)
                        tensors[f"optimizer/{owner}/{name}/{key}"] = own
    _set_optimizer_state(parts, optimizer, tensors)
    return saved.state, saved.step


def _full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
