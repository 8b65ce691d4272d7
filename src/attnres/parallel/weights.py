"""Whole tensors in and out of a model of which each process holds a part: parameters, and the buffers that are saved.

A part is a chunk's layers, of those the experts of expert parallelism, the rows or columns of tensor parallelism, of
those the shard of FSDP; buffers are whole. Names are the whole decoder's. A parameter of the residual connection with a
row a layer is known by its rows ("residual.pseudo_query.3"), since a chunk holds its own layers' only; tied embeddings
are known as embed_tokens.weight.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from ..model import Decoder, DecoderConfig
from ..model.decoder import Backbone, initial_weights, seeded

EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"


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


def place(model: Backbone, values: Iterable[tuple[str, Tensor]]) -> None:
    """Copies from whole tensors, or single rows, what `model` holds of them; others are passed over."""
    own = held_tensors(model)
    for name, value in values:
        for part, tensor in split_rows(model, name, value):
            if part in own:
                copy_part(own[part], tensor)
            if part == EMBEDDING and model.config.tie_word_embeddings and HEAD in own:
                copy_part(own[HEAD], tensor)


def split_rows(model: Backbone, name: str, value: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A parameter of the whole decoder as the parameters that a chunk may hold: itself, or its rows."""
    if name.removeprefix("residual.") in model.residual.layer_parameters and name.startswith("residual."):
        for layer, row in enumerate(value):
            yield f"{name}.{layer}", row
    yield name, value


@torch.no_grad()
def copy_part(parameter: Tensor, whole: Tensor) -> None:
    """Copies the part of `whole` that this process holds of a parameter."""
    if isinstance(parameter, DTensor):
        shape, offset = compute_local_shape_and_global_offset(
            parameter.shape, parameter.device_mesh, parameter.placements
        )
        part = tuple(slice(begin, begin + size) for begin, size in zip(offset, shape, strict=True))
        parameter.to_local().copy_(whole[part])
    else:
        parameter.copy_(whole)
