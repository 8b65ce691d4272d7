"""Expert parallelism: each process of a group holds some of the experts, and tokens travel to them and back.

Process r of P holds experts r E/P .. (r + 1) E/P - 1. A process's rows are sorted by expert and so by process; one
all-to-all brings them there and a second brings the outputs back (arXiv 2006.16668, section 3.2). The backward pass
runs both in reverse.
"""

from __future__ import annotations

import torch
from torch import Tensor, distributed, nn
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

from ..errors import UsageError
from ..model.layer import layers_of
from ..model.layers.experts import Experts, MixtureOfExperts
from .tensor import own_parts


def apply(module: nn.Module, mesh: DeviceMesh) -> None:
    """Splits the experts of all layers of `module` over ep (and tp) of `mesh`, which is `mesh.of_experts`, in place.

    It comes before tensor parallelism and sharding. After the backward pass `average_gradients` must follow.
    """
    own = mesh["ep", "tp"] if mesh["tp"].size() > 1 else mesh["ep"]
    for layer in layers_of(module):
        if layer.experts:
            split_experts(layer, own)  # type: ignore[arg-type]


def exchanged(experts: Experts, group: distributed.ProcessGroup) -> Experts:
    """What computes like all experts of `group` together; `experts` are this process's own.

    All processes of the group must call it together. The gradient of an expert is then the sum over the group's
    processes.
    """

    def run(x_RD: Tensor, count_E: Tensor) -> Tensor:
        processes = distributed.get_world_size(group)
        count_PE = count_E.view(processes, -1)
        arriving_PE = torch.empty_like(count_PE)
        distributed.all_to_all_single(arriving_PE, count_PE.contiguous(), group=group)
        sent, arriving = torch.stack([count_PE.sum(1), arriving_PE.sum(1)]).tolist()
        arrived = all_to_all_single_autograd(x_RD, arriving, sent, group)
        # they come sorted by process and then by expert
        expert = torch.arange(arriving_PE.shape[1], device=x_RD.device).repeat(processes)
        order = expert.repeat_interleave(arriving_PE.flatten()).argsort(stable=True)
        outputs = experts(arrived.index_select(0, order), arriving_PE.sum(0)).index_select(0, order.argsort())
        return all_to_all_single_autograd(outputs, sent, arriving, group)

    return run


def split_experts(layer: MixtureOfExperts, mesh: DeviceMesh) -> None:
    """Keeps this process's share of the layer's experts, in place; results stay those of all experts.

    mesh: [ep], the processes that share them, or [ep, tp]; tensor parallelism of the rest of the layer comes after. The
    weights must be equal on all processes; those of experts become DTensors. Each process goes on with tokens of its
    own; the gradients of router, norm and shared experts are those of its own tokens, the gradients of experts the sum
    over ep. Raises UsageError unless the experts divide.
    """
    processes = mesh["ep"].size()
    if layer.num_experts % processes:
        raise UsageError(
            f"num_experts must be a multiple of the processes that share them: {layer.num_experts} over {processes} "
            f"leaves {layer.num_experts % processes} over"
        )
    for name in layer.experts:
        placements = [Shard(0), Shard(layer.split[name])][: mesh.ndim]
        parameter = getattr(layer, name)
        share = distribute_tensor(parameter.detach(), mesh, placements, src_data_rank=None)
        setattr(layer, name, nn.Parameter(share, parameter.requires_grad))
    own, group = OwnExperts(layer), mesh.get_group("ep")
    layer.own_experts = own
    layer.exchange = lambda _: exchanged(own, group)


class OwnExperts(nn.Module):
    """A process's own experts: a module over the layer's own parameters, under the same names.

    So FSDP can shard them over fewer processes than the rest of the layer, while the layer's parameters keep their
    names.
    """

    def __init__(self, layer: MixtureOfExperts) -> None:
        super().__init__()
        self._parameters = layer._parameters  # one table: what FSDP puts there is what the layer computes with
        self.run, self.names = layer.run_experts, layer.experts

    def forward(self, x_RD: Tensor, count_E: Tensor) -> Tensor:
        with own_parts([(self, name) for name in self.names]):
            return self.run(x_RD, count_E)


def average_gradients(module: nn.Module, processes: int) -> None:
    """Divides the gradients of experts by the processes that share them: they become the mean, like all others.

    To be called once, after the backward passes of an optimizer step.
    """
    for layer in layers_of(module):
        if hasattr(layer, "own_experts"):
            for parameter in layer.own_experts.parameters():  # type: ignore[operator, union-attr]
                if parameter.grad is not None:
                    parameter.grad /= processes
