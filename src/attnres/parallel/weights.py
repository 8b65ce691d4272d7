"""Whole tensors in and out of a model of which each process holds a part: parameters, and the buffers that are saved.

A part is a chunk's layers, of those the experts of expert parallelism, the rows or columns of tensor parallelism, of
those the shard of FSDP; buffers are whole. Names are the whole decoder's. A parameter of the residual connection with a
row a layer is known by its rows ("residual.pseudo_query.3"), since a chunk holds its own layers' only; tied embeddings
are known as embed_tokens.weight.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from ..model import Decoder, DecoderConfig
from ..model.decoder import Backbone, initial_weights, seeded
from ..residual.base import LayerRows

EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"

OptimizerState = Mapping[str, Mapping[str, Mapping[str, Tensor]]]
"""Optimizer -> name of a parameter -> key, such as exp_avg -> tensor."""


class Pieces(NamedTuple):
    """What this process holds of a tensor of the whole model: plain tensors, each at its offset in the whole.

    shape: of the whole.
    """

    shape: tuple[int, ...]
    held: list[tuple[tuple[int, ...], Tensor]]


def initial_values(config: DecoderConfig, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Name and initial value, on the CPU, of every parameter of the whole decoder: those of `Decoder(config, seed)`.

    They come one at a time, for models that no process holds as a whole.
    """
    with torch.device("meta"):
        decoder = Decoder(config)
    yield from initial_weights(decoder, seed, torch.device("cpu"))
    with seeded(seed, torch.device("cpu")):
        residual = config.build_residual()
    for name, parameter in residual.named_parameters():
        yield f"residual.{name}", parameter.detach()


def held_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What `model` holds of all that a checkpoint saves: parameters and persistent buffers."""
    saved = model.state_dict().keys()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in saved}
    return {**dict(model.named_parameters()), **buffers}


@torch.no_grad()
def place(model: Backbone, values: Iterable[tuple[str, Tensor]]) -> None:
    """Copies from tensors of the whole decoder what `model` holds of them."""
    own = own_pieces([model])
    for name, value in values:
        for offset, piece in own[name].held if name in own else ():
            piece.copy_(value[tuple(slice(at, at + size) for at, size in zip(offset, piece.shape, strict=True))])


def own_piece(model: Backbone, name: str, tensor: Tensor) -> tuple[str, Pieces]:
    """Where in the whole decoder `tensor` lies, which `model` holds as `name`: the whole's name, and the piece.

    tensor: a parameter, a buffer, or what an optimizer keeps for a parameter: of its shape, or a scalar. The piece is
    its own memory.
    """
    if name == HEAD and model.config.tie_word_embeddings:
        name = EMBEDDING
    own, offset = tensor.detach(), (0,) * tensor.dim()
    shape = tuple(own.shape)
    if isinstance(own, DTensor):
        _, offset = compute_local_shape_and_global_offset(own.shape, own.device_mesh, own.placements)
        own = own.to_local()
    stacked, _, row = name.removeprefix("residual.").rpartition(".")
    if name.startswith("residual.") and stacked in model.residual.layer_parameters:
        name = f"residual.{stacked}"
        if own.dim():  # a scalar is the state of an optimizer, such as its count of steps
            rows = model.residual.get_submodule(stacked)
            assert isinstance(rows, LayerRows)
            return name, Pieces((rows.count, *shape), [((int(row), *offset), own[None])])
    return name, Pieces(shape, [(tuple(offset), own)])


def own_pieces(parts: Sequence[Backbone]) -> dict[str, Pieces]:
    """All that a checkpoint saves of the model, as far as this process holds it, by the whole decoder's names."""
    found: dict[str, Pieces] = {}
    for part in parts:
        for name, tensor in held_tensors(part).items():
            _add(found, *own_piece(part, name, tensor))
    return found


def own_state(parts: Sequence[Backbone], state: OptimizerState) -> dict[str, dict[str, dict[str, Pieces]]]:
    """The state of optimizers, with the tensors as in `own_pieces`."""
    holders = {name: part for part in parts for name, _ in part.named_parameters()}
    found: dict[str, dict[str, dict[str, Pieces]]] = {}
    for owner, parameters in state.items():
        for name, values in parameters.items():
            whole, _ = own_piece(holders[name], name, holders[name].get_parameter(name))
            of_parameter = found.setdefault(owner, {}).setdefault(whole, {})
            for key, value in values.items():
                _add(of_parameter, key, own_piece(holders[name], name, value)[1])
    return found


def _add(found: dict[str, Pieces], name: str, pieces: Pieces) -> None:
    known = found.setdefault(name, Pieces(pieces.shape, []))
    held = dict(known.held)
    for offset, tensor in pieces.held:
        # a tied pair is equal; a row without gradients stays behind in its count of steps
        if offset not in held or (offset == () and tensor > held[()]):
            held[offset] = tensor
    known.held[:] = held.items()
