"""A decoder without gradients over the processes of tensor parallelism: each has its share of every matrix, and keeps
the residual stream and all that depth attention reads for its own tokens only (paper section 4, long prompts).

    layer input   [B, T / P, D] -> all-gather -> [B, T, D] on every process
    layer output  partial sums [B, T, D] -> reduce-scatter -> [B, T / P, D]
    read over depth, and the norm after it: in between, on a process's own tokens, without a word to the others

T need not divide by P: every process holds ceil(T / P) tokens, the last ones of zeros. Fewer tokens than processes, as
in decoding, lie whole on all of them, and the sums are all-reduced: padding them would move more.
"""

from __future__ import annotations

import torch
from torch import Tensor, distributed, nn
from torch.distributed import ProcessGroup
from torch.nn import functional as F


class TokenShards:
    """Where T tokens lie on the P processes of a group. Its collectives have no gradient.

    `count` is the number that a process holds, padding included.
    """

    def __init__(self, group: ProcessGroup, tokens: int) -> None:
        self.group, self.tokens, self.processes = group, tokens, group.size()
        self.whole = tokens < self.processes or self.processes == 1
        self.count = tokens if self.whole else -(-tokens // self.processes)

    def own(self, x_BTD: Tensor) -> Tensor:
        """This process's tokens [B, count, D] of what all processes have whole."""
        if self.whole:
            return x_BTD
        return self._parts(x_BTD)[self.group.rank()].clone()  # a view would keep the whole

    def gather(self, own_BtD: Tensor) -> Tensor:
        """All tokens [B, T, D] from each process's own."""
        if self.whole:
            return own_BtD
        parts_PBtD = own_BtD.new_empty(self.processes, *own_BtD.shape)
        self._all_gather(parts_PBtD.flatten(0, 1), own_BtD.contiguous())
        return parts_PBtD.transpose(0, 1).flatten(1, 2)[:, : self.tokens].contiguous()

    def scatter(self, partial_BTD: Tensor) -> Tensor:
        """This process's tokens [B, count, D] of the sum over the processes."""
        if self.whole:
            total_BTD = partial_BTD.contiguous()
            self._all_reduce(total_BTD)
            return total_BTD
        parts_PBtD = self._parts(partial_BTD).contiguous()
        own_BtD = torch.empty_like(parts_PBtD[0])
        self._reduce_scatter(own_BtD, parts_PBtD.flatten(0, 1))
        return own_BtD

    def take(self, sublayer: nn.Module, output_BTD: Tensor) -> Tensor:
        """This process's tokens [B, count, D] of what a sublayer adds to the stream.

        Its output is a partial sum if it has an attribute `leaves_partial_sums`, else whole on every process.
        """
        return self.scatter(output_BTD) if hasattr(sublayer, "leaves_partial_sums") else self.own(output_BTD)

    def _parts(self, x_BTD: Tensor) -> Tensor:
        """[P, B, count, D], padded with zeros."""
        missing = self.processes * self.count - self.tokens
        padded = F.pad(x_BTD, (0, 0, 0, missing)) if missing else x_BTD
        return padded.unflatten(1, (self.processes, self.count)).transpose(0, 1)

    def _all_gather(self, into: Tensor, own: Tensor) -> None:
        distributed.all_gather_into_tensor(into, own, self.group)

    def _reduce_scatter(self, into: Tensor, parts: Tensor) -> None:
        distributed.reduce_scatter_tensor(into, parts, group=self.group)

    def _all_reduce(self, partial: Tensor) -> None:
        distributed.all_reduce(partial, group=self.group)
