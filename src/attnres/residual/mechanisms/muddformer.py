"""MUDDFormer: dynamic weights over all blocks' outputs, apart for what a block attends to and what it adds to
(multiway dynamic dense connections, arXiv 2502.12170).

    A_i   = GELU(RMSNorm(X_i) W_1) W_2 + a               [C, i + 1] weights a token; RMSNorm without weight
    Y_i^c = sum_{j <= i} A_i[c, j] X_j                   c: one of the C ways

X_0 is the embedding, X_i what block i gives. The paper has four ways into a block, the inputs of its queries, keys and
values and the residual stream, and one after the last block. An attention layer has one input here, so queries, keys
and values share a way and C = 2. A block is a Transformer block, two layers. W_1 is D x h with h = C (i + 1), four
times that for the output read, rounded up to 64 as in the authors' code. At init W_2 = 0 and a picks X_i: PreNorm.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ... import ops
from ..registry import register
from ..streams import project
from .block_bank import DenseResidual

NORM_EPS = 1e-6
WAYS = 2


@register("muddformer")
class MUDDFormer(DenseResidual):
    """MUDDFormer without PrePostDANorm, with one way for queries, keys and values.

    Args:
        dim: width D.
        num_layers: L; every attention and every MLP is one layer.
        block_size: layers in a block.

    Parameters, keyed by the layer that begins a block, "L" for the output read; n = entries of the bank, C = 2 ways (1
    for the output read), h inner width:
        down [h, D]: W_1, normal with variance 1 / D at init.
        up [C n, h]: W_2, zeros.
        static [C, n]: a, one for the latest entry, else zero.

    Raises UsageError for sizes that are not positive.
    """

    def __init__(self, dim: int, num_layers: int, *, block_size: int = 2) -> None:
        super().__init__(dim, num_layers, block_size)
        self.down, self.up, self.static = nn.ParameterDict(), nn.ParameterDict(), nn.ParameterDict()
        for layer in self.mixing_layers():
            ways, inner = self._sizes(layer)
            entries = self.bank_size(layer)
            self.down[str(layer)] = nn.Parameter(torch.empty(inner, dim))
            self.up[str(layer)] = nn.Parameter(torch.empty(ways * entries, inner))
            self.static[str(layer)] = nn.Parameter(torch.empty(ways, entries))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for key, static in self.static.items():
            nn.init.normal_(self.down[key], std=self.dim**-0.5)
            self.up[key].zero_()
            static.zero_()
            static[:, -1] = 1

    def weights(self, latest: Tensor, layer: int) -> Tensor:
        """A: the weights [C, n, ...] with which `layer` mixes the bank, whose last entry is `latest` [..., D]."""
        key = str(layer)
        inner = F.gelu(project(latest, self.down[key], NORM_EPS))
        with torch.autocast(latest.device.type, enabled=False):
            dynamic = F.linear(inner, self.up[key].to(inner.dtype))
        return (dynamic.unflatten(-1, self.static[key].shape) + self.static[key]).movedim((-2, -1), (0, 1))

    def aggregate(self, bank: tuple[Tensor, ...], layer: int) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        ways = []
        for weights in self.weights(bank[-1], layer):
            way, read = ops.weighted_sum(weights, bank)
            ways.append(way)
            bank = tuple(read)
        return ways[0], ways[-1], bank

    def read_flops(self, layer: int) -> int:
        if layer not in self.mixing_layers():
            return 0
        ways, inner = self._sizes(layer)
        entries = self.bank_size(layer)
        return 2 * inner * (self.dim + ways * entries) + 2 * ways * entries * self.dim

    def _sizes(self, layer: int) -> tuple[int, int]:
        """(ways, inner width) of the weights' network for `layer`."""
        ways, wider = (1, 4) if layer == self.num_layers else (WAYS, 1)
        return ways, (ways * wider * self.bank_size(layer) // 64 + 1) * 64
