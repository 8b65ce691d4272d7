"""Balancing of experts after an optimizer step, and how even their load was."""

from collections.abc import Iterable

import torch
from torch import distributed, nn

from ..model.layers.experts import MixtureOfExperts


def balance_experts(
    parts: Iterable[nn.Module],
    data: Iterable[distributed.ProcessGroup] = (),
    layers: Iterable[distributed.ProcessGroup] = (),
) -> dict[str, float]:
    """Updates the correction bias of every mixture of experts in `parts` from the load of the step.

    data: process groups, over all of which loads are summed; layers: those whose processes hold other layers. Returns
    "max_load" and "min_load", those of the most and the least used expert relative to the mean, averaged over layers;
    nothing for a model without experts.
    """
    experts = [module for part in parts for module in part.modules() if isinstance(module, MixtureOfExperts)]
    for group in data if experts else ():
        for module in experts:
            distributed.all_reduce(module.load, group=group)
    extremes = torch.zeros(3, dtype=torch.float64, device=experts[0].load.device if experts else None)
    for module in experts:
        relative = module.load.double() / module.load.double().mean().clamp(min=1)
        extremes += torch.stack([relative.max(), relative.min(), torch.ones_like(relative[0])])
        module.update_bias()
    for group in layers:
        distributed.all_reduce(extremes, group=group)
    highest, lowest, count = extremes.tolist()
    return {"max_load": highest / count, "min_load": lowest / count} if count else {}
