"""Muon for batches of matrices, such as the experts of a layer: torch.optim.Muon for each matrix, all at once.

    m <- 0.95 m + 0.05 g
    u = NewtonSchulz(0.05 g + 0.95 m)
    W <- (1 - lr decay) W - lr 0.2 sqrt(max(rows, columns)) u

Source: Moonlight, arXiv 2502.16982, section 2.2. torch.optim.Muon takes single matrices only.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

MOMENTUM, EPS = 0.95, 1e-7
A, B, C = 3.4445, -4.7750, 2.0315
"""Coefficients of torch.optim.Muon's Newton-Schulz iteration, of which there are five."""


class ExpertMuon(torch.optim.Optimizer):
    """Muon with Nesterov momentum and AdamW's update RMS for parameters [E, rows, columns].

    A parameter may be a DTensor, split in any way; its state is then split alike.
    """

    def __init__(self, params: Any, lr: float = 1e-3, weight_decay: float = 0.1) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    _update(parameter, parameter.grad, self.state[parameter], group)


class Muon(torch.optim.Muon):
    """torch.optim.Muon with AdamW's update RMS, also for DTensors with fewer rows or columns than processes share them.

    Those torch cannot update in place; here every process has the whole of such a matrix for a moment. There are few of
    them and they are small: a gate with a row for every head.
    """

    def __init__(self, params: Any, lr: float = 1e-3, weight_decay: float = 0.1) -> None:
        super().__init__(params, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        pairs = [(parameter, group) for group in self.param_groups for parameter in group["params"]]
        thin = [(p, p.grad, group) for p, group in pairs if p.grad is not None and _is_thin(p)]
        for parameter, _, _ in thin:
            parameter.grad = None  # which the others' step passes over
        super().step()
        for parameter, gradient, group in thin:
            parameter.grad = gradient
            _update(parameter, gradient, self.state[parameter], group)


def newton_schulz(x_ERC: Tensor) -> Tensor:
    """Every matrix [R, C] of the batch with its singular values near 1, in bfloat16."""
    x = x_ERC.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=EPS)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=B, alpha=C), x, beta=A)
    return x.mT if tall else x


def _update(parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
    if not state:
        state["momentum_buffer"] = torch.zeros_like(gradient)
    momentum = state["momentum_buffer"].lerp_(gradient, 1 - MOMENTUM)
    update = _whole_matrices(gradient.lerp(momentum, MOMENTUM))
    rate = group["lr"] * 0.2 * math.sqrt(max(parameter.shape[-2:]))
    parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(update.to(parameter.dtype), alpha=-rate)


def _is_thin(parameter: Tensor) -> bool:
    if not isinstance(parameter, DTensor):
        return False
    parts = [1] * parameter.dim()
    for size, placement in zip(parameter.device_mesh.shape, parameter.placements, strict=True):
        if not placement.is_replicate():
            parts[placement.dim] *= size  # type: ignore[attr-defined]
    return any(length < count for length, count in zip(parameter.shape, parts, strict=True))


def _whole_matrices(update: Tensor) -> Tensor:
    """`newton_schulz` where each process has whole matrices: those split otherwise are exchanged for it."""
    if not isinstance(update, DTensor):
        return newton_schulz(update)
    if update.dim() == 2:
        by_matrix = update.redistribute(placements=[Replicate()] * update.device_mesh.ndim)
    else:
        by_matrix = update.redistribute(placements=[Shard(0) if p.is_shard() else p for p in update.placements])
    local = by_matrix.to_local()
    own = newton_schulz(local.view(-1, *local.shape[-2:])).view(local.shape)
    result = DTensor.from_local(
        own, update.device_mesh, by_matrix.placements, run_check=False, shape=update.shape, stride=update.stride()
    )
    return result.redistribute(placements=update.placements)
