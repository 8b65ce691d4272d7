"""transformers' tensor parallelism for hybrids: each process has its share of the heads and of every inner width.

A plan of transformers goes by the names of modules, and in a hybrid one name stands for matrices that are split in
different ways, or for a parameter that no module holds. So its plan covers the embedding and the head alone, and each
layer runs on this process's part of its parameters, as if it were smaller. Sums over the processes: of a layer's
output, and in the backward pass of the gradients of its input and of the parameters that every process has whole.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate

from ..errors import UsageError
from ..model.layer import layers_of
from ..parallel.tensor import split_layer
from .configuration import AttnResConfig
from .tensor_parallel import check_divides


def check_sizes(config: AttnResConfig, distributed: Any) -> None:
    """Raises UsageError if the heads of a hybrid do not divide by the processes, or they are to be sharded as well."""
    heads = dict.fromkeys(name for kind in config.layer_kinds if kind.is_attention for name in kind.divides)
    check_divides(config, distributed.tp_size, heads)
    if getattr(distributed, "fsdp_size", 1) not in (1, None):
        raise UsageError(
            "fsdp_size must be 1 where tp_size is more: a model with delta attention, latent attention or experts is "
            "split in one way at a time here; attnres train does both"
        )


def split_layers(model: nn.Module, mesh: DeviceMesh) -> None:
    """Makes the layers' parameters a process's share of them, by DTensors, before or after they have values.

    mesh: the processes of tensor parallelism, 1-D. A layer takes and returns whole tokens, equal on all processes.
    """
    for layer in layers_of(model):
        split_layer(layer, mesh, Replicate(), lambda parameter: _summed_backward(parameter, mesh))


def _summed_backward(x: Any, mesh: DeviceMesh) -> Tensor:
    """x itself; its gradient becomes the sum of the processes'."""
    if not (torch.is_grad_enabled() and x.requires_grad):
        return x
    return DTensor.from_local(x, mesh, [Replicate()]).to_local(grad_placements=[Partial()])
