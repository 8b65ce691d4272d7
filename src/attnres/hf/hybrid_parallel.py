"""transformers' tensor parallelism for hybrids: each process has its share of the heads and of every inner width.

A plan of transformers goes by the names of modules, and in a hybrid one name stands for matrices that are split in
different ways, or for a parameter that no module holds. So its plan covers the embedding and the head alone, and each
layer runs on this process's part of its parameters, as if it were smaller. Sums over the processes: of a layer's
output, and in the backward pass of the gradients of its input and of the parameters that every process has whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from ..errors import UsageError
from ..model.attention import Attention, Context
from ..model.feed_forward import FeedForward
from ..parallel.tensor import OWN_SHARE
from .configuration import AttnResConfig

_SPLIT: dict[type[nn.Module], dict[str, int]] = {
    **OWN_SHARE,
    Attention: {"q_proj.weight": 0, "k_proj.weight": 0, "v_proj.weight": 0, "o_proj.weight": 1},
    FeedForward: {"gate_proj.weight": 0, "up_proj.weight": 0, "down_proj.weight": 1},
}
_HEADS = {
    "gqa": ("num_attention_heads", "num_key_value_heads"),
    "mla": ("num_attention_heads",),
    "kda": ("linear_num_heads",),
}


def check_sizes(config: AttnResConfig, distributed: Any) -> None:
    """Raises UsageError if the heads of a hybrid do not divide by the processes, or they are to be sharded as well."""
    processes = distributed.tp_size
    for name in dict.fromkeys(name for kind in config.attention_kinds for name in _HEADS[kind]):
        if left := getattr(config, name) % processes:
            raise UsageError(
                f"{name} must be a multiple of the tensor-parallel processes: {getattr(config, name)} over {processes} "
                f"leaves {left} over; start another number of processes"
            )
    if getattr(distributed, "fsdp_size", 1) not in (1, None):
        raise UsageError(
            "fsdp_size must be 1 where tp_size is more: a model with delta attention, latent attention or experts is "
            "split in one way at a time here; attnres train does both"
        )


def split_layers(layers: nn.ModuleList, mesh: DeviceMesh) -> None:
    """Makes the layers' parameters a process's share of them, by DTensors, before or after they have values.

    mesh: the processes of tensor parallelism, 1-D. A layer takes and returns whole tokens, equal on all processes.
    """
    for layer in layers:
        _split_layer(layer, mesh, _SPLIT[type(layer)])


def _split_layer(layer: nn.Module, mesh: DeviceMesh, dims: dict[str, int]) -> None:
    placed: list[tuple[nn.Module, str, bool]] = []
    for path, parameter in list(layer.named_parameters()):
        owner, _, name = path.rpartition(".")
        module = layer.get_submodule(owner)
        if path in dims:
            part = distribute_tensor(parameter.data, mesh, [Shard(dims[path])], src_data_rank=None)
            module.register_parameter(name, nn.Parameter(part, parameter.requires_grad))
        placed.append((module, name, path in dims))
    whole = layer.forward

    def forward(x: Tensor, context: Context) -> Tensor:
        with _own_parts(placed, mesh):
            share = whole(_summed_backward(x, mesh), context)
        return DTensor.from_local(share, mesh, [Partial()]).redistribute(placements=[Replicate()]).to_local()

    layer.forward = forward  # type: ignore[method-assign]


@contextmanager
def _own_parts(placed: list[tuple[nn.Module, str, bool]], mesh: DeviceMesh) -> Iterator[None]:
    held = [module._parameters[name] for module, name, _ in placed]
    try:
        for (module, name, is_split), parameter in zip(placed, held, strict=True):
            own: Any = parameter.to_local() if is_split else _summed_backward(parameter, mesh)  # type: ignore[union-attr]
            module._parameters[name] = own
        yield
    finally:
        for (module, name, _), parameter in zip(placed, held, strict=True):
            module._parameters[name] = parameter


def _summed_backward(x: Any, mesh: DeviceMesh) -> Tensor:
    """x itself; its gradient becomes the sum of the processes'."""
    if not (torch.is_grad_enabled() and x.requires_grad):
        return x
    return DTensor.from_local(x, mesh, [Replicate()]).to_local(grad_placements=[Partial()])
