"""DenseFormer: a depth-weighted average of all blocks' outputs after every block (arXiv 2402.02622, section 3).

    Y_i = sum_{j <= i, j = i mod k} alpha_ij X_j         alpha_ij a scalar

X_0 is the embedding and X_i what block i gives from Y_{i-1}. k is the dilation; with a period p only every p-th block
is followed by an average and Y_i = X_i after the others. At init alpha_ii = 1 and the rest is zero, which is PreNorm.
A block is a Transformer block, two layers, as in the paper.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ... import ops
from ...errors import check_counts
from ...ops.formulas import statistics_dtype
from ..registry import register
from .block_bank import DenseResidual


@register("denseformer")
class DenseFormer(DenseResidual):
    """DenseFormer.

    Args:
        dim: width D.
        num_layers: L; every attention and every MLP is one layer.
        block_size: layers in a block.
        dilation: k, how many blocks apart the averaged outputs are.
        period: p, an average follows every p-th block.

    Parameters: alpha, one vector for each layer that begins a block after an average and one for the output read
    ("L"), keyed by that layer: the weights of every k-th X_j up to X_i, oldest first, at least one of them: zero at
    init, but one for X_i. Raises UsageError for sizes that are not positive.
    """

    def __init__(self, dim: int, num_layers: int, *, block_size: int = 2, dilation: int = 1, period: int = 1) -> None:
        super().__init__(dim, num_layers, block_size)
        check_counts(dilation=dilation, period=period)
        self.dilation, self.period = dilation, period
        self.alpha = nn.ParameterDict(
            {
                str(layer): nn.Parameter(torch.empty(len(self.chosen(layer))))
                for layer in self.mixing_layers()
                if (self.bank_size(layer) - 1) % period == 0
            }
        )
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for weights in self.alpha.values():
            weights.zero_()
            weights[-1] = 1

    def chosen(self, layer: int) -> range:
        """The entries of the bank that are averaged for `layer`."""
        latest = self.bank_size(layer) - 1
        return range(latest % self.dilation, latest + 1, self.dilation)

    def aggregate(self, bank: tuple[Tensor, ...], layer: int) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        if (len(bank) - 1) % self.period:
            return bank[-1], bank[-1], bank
        chosen = self.chosen(layer)
        weights = self.alpha[str(layer)].to(statistics_dtype(bank[0].dtype))
        average, read = ops.weighted_sum(weights, [bank[j] for j in chosen])
        handed_on = dict(zip(chosen, read, strict=True))
        return average, average, tuple(handed_on.get(j, x) for j, x in enumerate(bank))

    def read_flops(self, layer: int) -> int:
        if layer not in self.mixing_layers() or (self.bank_size(layer) - 1) % self.period:
            return 0
        return 2 * len(self.chosen(layer)) * self.dim

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, dilation={self.dilation}, period={self.period}"
