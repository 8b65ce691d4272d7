"""Expert parallelism: each process of a group holds some of the experts, and tokens travel to them and back.

Process r of P holds experts r E/P .. (r + 1) E/P - 1. A process's rows are sorted by expert and so by process; one
all-to-all brings them there and a second brings the outputs back (arXiv 2006.16668, section 3.2). The backward pass
runs both in reverse.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, distributed, nn
from torch.distributed._functional_collectives import all_to_all_single_autograd

from ..errors import UsageError
from ..model.moe import Experts, MixtureOfExperts


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


def split_experts(layer: MixtureOfExperts, group: distributed.ProcessGroup) -> None:
    """Keeps this process's share of the layer's experts, in place; results stay those of all experts.

    Its weights must be equal on all processes. Each process goes on with tokens of its own; the gradients of router,
    norm and shared experts are those of its own tokens, the gradients of experts the sum over the group. Raises
    UsageError unless the experts divide.
    """
    processes, own = distributed.get_world_size(group), distributed.get_rank(group)
    if layer.num_experts % processes:
        raise UsageError(
            f"num_experts must be a multiple of the processes that share them: {layer.num_experts} over {processes} "
            f"leaves {layer.num_experts % processes} over"
        )
    for name in ("gate_proj", "up_proj", "down_proj"):
        parameter = getattr(layer, name)
        share = parameter.detach().chunk(processes)[own].clone()
        setattr(layer, name, nn.Parameter(share, parameter.requires_grad))
    layer.exchange = partial(exchanged, group=group)
