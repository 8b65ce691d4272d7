"""The norm of a gradient that lies on many processes, and clipping by it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor


@torch.no_grad()
def clip(
    parameters: Iterable[nn.Parameter],
    max_norm: float | None,
    mesh: DeviceMesh,
    copies: Iterable[Tensor] = (),
    expert_mesh: DeviceMesh | None = None,
) -> Tensor:
    """Scales the gradients down to the global L2 norm `max_norm`; returns their norm before, 0-dim fp64.

    The norm is the one that a single process would have: over all processes of `mesh`, the job's [pp, dp, shard, tp],
    with every element counted once. copies: those parameters that another process of the pipeline counts, such as the
    weight of a tied head; they are scaled with the rest. expert_mesh: `mesh.of_experts`, on which split experts lie.
    Where the norm is not finite the gradients stay as they are, so that the wrong ones can be found. max_norm None: no
    clipping.
    """
    uncounted = set(copies)
    parts: list[Tensor] = []
    counted: dict[frozenset[str], list[Tensor]] = {}
    for parameter in parameters:
        if (gradient := parameter.grad) is not None:
            parts.append(gradient.to_local() if isinstance(gradient, DTensor) else gradient)
            if parameter not in uncounted:
                counted.setdefault(_split_over(gradient), []).append(parts[-1])
    # of what is whole, split over shard, and split over ep and perhaps expert_shard; each whole or split over tp
    squares = torch.zeros(3, 2, dtype=torch.float64, device=mesh.device_type)
    for names, own in counted.items():
        row = 2 if "ep" in names else int("shard" in names)
        squares[row, int("tp" in names)] += nn.utils.get_total_norm(own).double().square()
    distributed.all_reduce(squares[1], group=mesh.get_group("shard"))
    if expert_mesh is not None:
        for name in ("expert_shard", "ep"):
            distributed.all_reduce(squares[2], group=expert_mesh.get_group(name))
    by_tp = squares.sum(0)
    distributed.all_reduce(by_tp[1], group=mesh.get_group("tp"))
    total = by_tp.sum()
    distributed.all_reduce(total, group=mesh.get_group("pp"))
    norm = total.sqrt()
    if max_norm is not None and norm.isfinite():
        torch._foreach_mul_(parts, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


def _split_over(gradient: Tensor) -> frozenset[str]:
    """The dimensions of its mesh over whose processes its elements lie."""
    if not isinstance(gradient, DTensor):
        return frozenset()
    names = gradient.device_mesh.mesh_dim_names or ()
    return frozenset(n for n, placement in zip(names, gradient.placements, strict=True) if not placement.is_replicate())
