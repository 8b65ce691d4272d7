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
from torch.distributed.tensor import DTensor, Shard

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
                if (gradient := parameter.grad) is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(gradient)
                momentum = state["momentum_buffer"].lerp_(gradient, 1 - MOMENTUM)
                update = _whole_matrices(gradient.lerp(momentum, MOMENTUM))
                rate = group["lr"] * 0.2 * math.sqrt(max(parameter.shape[-2:]))
                parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(update.to(parameter.dtype), alpha=-rate)


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


def _whole_matrices(update: Tensor) -> Tensor:
    """`newton_schulz` where each process has whole matrices: those split otherwise are exchanged for it."""
    if not isinstance(update, DTensor):
        return newton_schulz(update)
    by_matrix = update.redistribute(placements=[Shard(0) if p.is_shard() else p for p in update.placements])
    own = newton_schulz(by_matrix.to_local())
    result = DTensor.from_local(
        own, update.device_mesh, by_matrix.placements, run_check=False, shape=update.shape, stride=update.stride()
    )
    return result.redistribute(placements=update.placements)
