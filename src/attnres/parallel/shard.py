"""Sharded data parallelism: FSDP2 over the mesh's shard dimension, replicated over dp (HSDP).

One group for every Transformer block, so that a block's matrices arrive in one message and go when it is done; and the
root's group for the embedding, the head, the residual connection and the norms. A mechanism folds a layer's norm into
its read, before the layer's forward pass begins, so norms must be there all the time.
"""

from __future__ import annotations

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from ..model.layers import ATTENTION_LAYERS


def apply(module: nn.Module, mesh: DeviceMesh) -> None:
    """Shards the parameters of `module`, a decoder or a part of one, over the dimensions dp and shard of `mesh`.

    It happens in place; nothing happens if both have size 1. Gradients become the mean over both dimensions. Tensor
    parallelism comes before, the optimizer after. Precision is autocast's business.
    """
    if mesh["dp", "shard"].size() == 1:
        return
    data = mesh["dp", "shard"] if mesh["dp"].size() > 1 else mesh["shard"]
    # A pipeline keeps gathered matrices from a step's first micro-batch to its last: gathering them again for each
    # would cost more than it saves, and a backward pass in two parts would lose gradients.
    reshard = mesh["pp"].size() == 1
    layers = list(module.get_submodule("layers").children())
    matrices = {parameter for layer in layers for parameter in layer.parameters()} - _norms(layers)
    # from the top down: the root would pass over norms inside of layers that are sharded already
    fully_shard(module, mesh=data, ignored_params=matrices)
    norms = _norms(layers)  # they are other tensors now
    for block in transformer_blocks(layers):
        fully_shard(block, mesh=data, ignored_params=norms, reshard_after_forward=reshard)


def reshard(module: nn.Module) -> None:
    """Gives back what a forward pass without gradients gathered; else it would stay until the next backward pass."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def transformer_blocks(layers: list[nn.Module]) -> list[list[nn.Module]]:
    """Successive layers in groups, each of which an attention begins (the first may have lost it to another stage)."""
    blocks: list[list[nn.Module]] = []
    for layer in layers:
        if isinstance(layer, ATTENTION_LAYERS) or not blocks:
            blocks.append([])
        blocks[-1].append(layer)
    return blocks


def _norms(layers: list[nn.Module]) -> set[nn.Parameter]:
    return {parameter for layer in layers for parameter in layer.get_submodule("norm").parameters()}
