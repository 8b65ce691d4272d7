"""Delta AttnRes: the plain residual stream, plus attention over what earlier layers added to it (arXiv 2605.18855).

    h_l = x_l + sum_j softmax_j(w_l . RMSNorm(d_j)) d_j          x_l = d_0 + .. + d_{l-1}, the stream

The deltas d_j are the embedding and all layer outputs so far, or in the block form the embedding and the sums of the
finished blocks. Layer 0 and the output head read the stream alone, as in the authors' code
(wdlctc/delta-attention-residuals-code). At init w = 0: the stream plus the mean of the deltas, which without blocks is
the stream times 1 + 1/n and so PreNorm to the layers' norms.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ... import ops
from ...errors import UsageError
from ..base import Residual, normed, split_norm
from ..registry import register
from .block_attnres import block_starts


class DeltaState(NamedTuple):
    """deltas: embedding and finished blocks, each [..., D]; partial: sum of the present block's outputs, None at its
    start; stream: the sum of all of them, None where it is to be computed."""

    deltas: tuple[Tensor, ...]
    partial: Tensor | None
    stream: Tensor | None


@register("delta_attnres")
class DeltaAttnRes(Residual):
    """Delta AttnRes.

    Args:
        dim: width D.
        num_layers: L; every attention and every MLP is one layer.
        block_size: layers in a block; 1 is Full.
        eps: of the key norms.

    Parameters (row i = layer i, row 0 without effect): pseudo_query [L, D], zeros at init; key_norm [L, D], ones.
    Raises UsageError for bad values.
    """

    layer_parameters = ("pseudo_query", "key_norm")

    def __init__(self, dim: int, num_layers: int, *, block_size: int = 1, eps: float = 1e-6) -> None:
        super().__init__(dim, num_layers)
        if not eps >= 0:
            raise UsageError(f"eps must be zero or positive; it is {eps}")
        self.eps = eps
        self.block_size = block_size
        self.block_starts = block_starts(num_layers, block_size, None)
        self.pseudo_query = nn.Parameter(torch.empty(num_layers, dim))
        self.key_norm = nn.Parameter(torch.empty(num_layers, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.pseudo_query)
        nn.init.ones_(self.key_norm)

    def start(self, embedding: Tensor) -> DeltaState:
        return DeltaState((embedding,), None, None if self.lean else embedding)

    def read(self, state: DeltaState, layer: int, norm: nn.Module | None = None) -> tuple[Tensor, DeltaState]:
        deltas, partial, stream = state
        stream = self._sum(state) if stream is None else stream
        if layer in (0, self.num_layers):
            return normed(stream, norm), DeltaState(deltas, partial, stream)
        query, key_norm = self.row("pseudo_query", layer), self.row("key_norm", layer)
        selected, handed_on = ops.read_norm_chained(query, deltas, key_norm, self.eps)
        fold, rest = split_norm(norm, self.dim)
        _, x = ops.add_norm(stream, selected, norm=fold)
        return normed(x, rest), DeltaState(tuple(handed_on), partial, stream)

    def write(self, state: DeltaState, layer: int, output: Tensor) -> DeltaState:
        deltas, partial, stream = state
        partial = output if partial is None else partial + output
        if layer + 1 == self.num_layers or layer + 1 in self.block_starts:
            deltas, partial = (*deltas, partial), None
        return DeltaState(deltas, partial, None if self.lean or stream is None else stream + output)

    def writes_behind_read(self, layer: int) -> bool:
        return layer in self.block_starts

    def latest(self, state: DeltaState) -> Tensor:
        return state.deltas[-1] if state.partial is None else state.partial

    def tensor_names(self, state: DeltaState, layer: int) -> list[str]:
        names = [f"delta {n}" for n in range(len(state.deltas))]
        return names if state.partial is None else [*names, f"partial {layer}"]

    def depth_weights(self, state: DeltaState, layer: int) -> Tensor:
        """Softmax weights [number of deltas, ...] of the read of `layer`, 0 < layer < num_layers."""
        query, key_norm = self.row("pseudo_query", layer), self.row("key_norm", layer)
        return ops.depth_attention(query, state.deltas, key_norm, self.eps, return_weights=True)[1]

    def read_flops(self, layer: int) -> int:
        if layer in (0, self.num_layers):
            return 0
        deltas = sum(start <= layer for start in self.block_starts)
        return (6 * deltas + 1) * self.dim

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, block_size={self.block_size}, eps={self.eps}"

    def _sum(self, state: DeltaState) -> Tensor:
        stream = state.deltas[0]
        for delta in (*state.deltas[1:], state.partial):
            stream = stream if delta is None else stream + delta
        return stream
