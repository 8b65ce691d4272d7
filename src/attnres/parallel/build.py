"""From a configuration to the parts of the model that one process holds: cut, split, sharded, with initial weights."""

from __future__ import annotations

import torch
from torch.distributed.device_mesh import DeviceMesh

from ..model import DecoderConfig
from . import experts, tensor, weights
from . import fsdp as shard
from .part import ModelPart
from .pipeline import Layout, chunks


def build_parts(
    config: DecoderConfig,
    layout: Layout,
    mesh: DeviceMesh,
    device: torch.device,
    context: int,
    seed: int,
    checkpointing: bool = False,
    dtype: torch.dtype = torch.float32,
    expert_mesh: DeviceMesh | None = None,
) -> list[ModelPart]:
    """This process's chunks, in the order of their layers; without a pipeline the whole decoder is one.

    No process ever holds more than its own parts and one whole matrix. The initial weights are those of
    `Decoder(config, seed)`. context: tokens T of a sequence; dtype: of the parameters; expert_mesh: `mesh.of_experts`.
    """
    parts = chunks(config, layout, mesh["pp"].get_local_rank(), context)
    for part in parts:
        part.to(dtype)
        if expert_mesh is not None:
            experts.apply(part, expert_mesh)
        if mesh["tp"].size() > 1:
            tensor.apply(part, mesh["tp"])
        shard.apply(part, mesh, expert_mesh)
        part.to_empty(device=device)
    for part in parts:
        if config.tie_word_embeddings and part.is_first and part.is_last:
            part.lm_head.weight = part.embed_tokens.weight  # some moves part them
        for buffer in part.buffers():
            buffer.zero_()  # the experts' balance, which begins at zero
        weights.place(part, weights.initial_values(config, seed))
        part.enable_checkpointing(checkpointing)
    return parts
