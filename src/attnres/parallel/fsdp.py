"""Sharded data parallelism: FSDP2 over the mesh's shard dimension, replicated over dp (HSDP).

One group for every Transformer block, so that a block's matrices arrive in one message and go when it is done; and the
root's group for the embedding, the head, the residual connection and the norms. A mechanism folds a layer's norm into
its read, before the layer's forward pass begins, so norms must be there all the time.
"""

from __future__ import annotations

from typing import cast

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from ..model.layer import Layer, layers_of
from .experts import OwnExperts


def apply(module: nn.Module, mesh: DeviceMesh, expert_mesh: DeviceMesh | None = None) -> None:
    """Shards the parameters of `module`, a decoder or a part of one, over the dimensions dp and shard of `mesh`.

    Those of experts that are split already go over expert_dp and expert_shard of `expert_mesh` (`mesh.of_experts`). It
    happens in place; nothing happens where both dimensions have size 1. Gradients become the mean over both dimensions.
    Expert and tensor parallelism come before, the optimizer after. Precision is autocast's business.
    """
    if (data := _sharing(mesh, "dp", "shard")) is None:
        return
    # A pipeline keeps gathered matrices from a step's first micro-batch to its last: gathering them again for each
    # would cost more than it saves, and a backward pass in two parts would lose gradients.
    reshard = mesh["pp"].size() == 1
    layers = layers_of(module)
    matrices = {parameter for layer in layers for parameter in layer.parameters()} - _norms(layers)
    # from the top down: the root would pass over norms inside of layers that are sharded already
    fully_shard(module, mesh=data, ignored_params=matrices)
    experts: list[OwnExperts] = [layer.own_experts for layer in layers if hasattr(layer, "own_experts")]  # type: ignore[misc]
    if expert_mesh is not None and (copies := _sharing(expert_mesh, "expert_dp", "expert_shard")) is not None:
        for part in experts:
            fully_shard(part, mesh=copies, reshard_after_forward=reshard)
    grouped = _norms(layers) | {parameter for part in experts for parameter in part.parameters()}  # other tensors now
    for block in transformer_blocks(layers):
        fully_shard(cast(list[nn.Module], block), mesh=data, ignored_params=grouped, reshard_after_forward=reshard)
        for layer in block:
            layer.norm_is_gathered = True  # type: ignore[assignment]  # with the root's group


def _sharing(mesh: DeviceMesh, replicate: str, shard: str) -> DeviceMesh | None:
    """The part of `mesh` that FSDP takes for these dimensions; None for a single process."""
    if mesh[replicate, shard].size() == 1:
        return None
    return mesh[replicate, shard] if mesh[replicate].size() > 1 else mesh[shard]


def reshard(module: nn.Module) -> None:
    """Gives back what a forward pass without gradients gathered; else it would stay until the next backward pass."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def transformer_blocks(layers: list[Layer]) -> list[list[Layer]]:
    """Successive layers in groups, each of which an attention begins (the first may have lost it to another stage)."""
    blocks: list[list[Layer]] = []
    for layer in layers:
        if layer.is_attention or not blocks:
            blocks.append([])
        blocks[-1].append(layer)
    return blocks


def _norms(layers: list[Layer]) -> set[nn.Parameter]:
    return {parameter for layer in layers for parameter in layer.norm.parameters()}
