"""LAuReL: the residual connection as a small learned linear map of the layer's input and of inputs before it.

    x_{l+1} = a_l F_l(norm(x_l)) + b_l (x_l + B_l A_l (x_l + sum_{j=1..k} gamma_{l,j} x_{l-j}))

Menghani et al., arXiv 2411.07501. RW learns the two weights a and b, LR adds the low-rank map B A, PA feeds that map
with what k earlier layers saw too; they are options here, as the paper combines them. The paper bounds the weights of
RW without saying how: here both are 2 sigmoid(.), so that they start at 1. A starts with orthonormal rows, B and gamma
at zero, so that the model starts as PreNorm. A layer with fewer than k predecessors takes those it has.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import UsageError
from ..base import State
from ..registry import register
from .prenorm import PreNorm


class LaurelState(NamedTuple):
    """stream: the sum so far, [..., D]; update: what is not yet added to it; history: what the last `previous` layers
    saw, the latest last."""

    stream: Tensor
    update: Tensor | None
    history: tuple[Tensor, ...]


@register("laurel")
class Laurel(PreNorm):
    """LAuReL, by default RW and LR as in the paper's language models.

    Args:
        dim: width D.
        num_layers: L; every attention and every MLP is one layer.
        weights: RW: learn a weight for the layer's output and one for its input.
        rank: of the low-rank map of LR, at most D; 0 leaves it out.
        previous: PA: how many inputs of earlier layers the low-rank map takes beside the present one.

    Parameters: weight_logits [L, 2] (output, input), zeros at init; down [L, r, D], orthonormal rows; up [L, D, r] and
    previous_weights [L, k], zeros. Raises UsageError for sizes out of range, or if nothing is left to learn.
    """

    def __init__(self, dim: int, num_layers: int, *, weights: bool = True, rank: int = 4, previous: int = 0) -> None:
        super().__init__(dim, num_layers)
        if not isinstance(rank, int) or not 0 <= rank <= dim:
            raise UsageError(f"rank must be a whole number from 0 to the width, {dim}; it is {rank!r}")
        if not isinstance(previous, int) or previous < 0:
            raise UsageError(f"previous must be zero or a positive whole number; it is {previous!r}")
        if previous and not rank:
            raise UsageError("previous needs the low-rank map; give a rank of 1 or more")
        if not weights and not rank:
            raise UsageError("laurel has nothing to learn; set weights, or give a rank of 1 or more")
        self.weights, self.rank, self.previous = weights, rank, previous
        self.weight_logits: nn.Parameter
        self.down: nn.Parameter
        self.up: nn.Parameter
        self.previous_weights: nn.Parameter
        shapes = {
            "weight_logits": (num_layers, 2) if weights else None,
            "down": (num_layers, rank, dim) if rank else None,
            "up": (num_layers, dim, rank) if rank else None,
            "previous_weights": (num_layers, previous) if previous else None,
        }
        for name, shape in shapes.items():
            if shape is not None:
                self.register_parameter(name, nn.Parameter(torch.empty(shape)))
        self.layer_parameters = tuple(name for name, shape in shapes.items() if shape is not None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for parameter in self.parameters():
            nn.init.zeros_(parameter)
        if self.rank:
            columns = torch.randn(self.down.mT.shape, device=self.down.device)
            with torch.no_grad():
                self.down.copy_(torch.linalg.qr(columns).Q.mT)

    def start(self, embedding: Tensor) -> State:
        return LaurelState(embedding, None, ())

    def write(self, state: State, layer: int, output: Tensor) -> State:
        kept = x = state.stream
        if self.rank:
            seen = x
            gammas = self.row("previous_weights", layer).unbind() if self.previous else ()
            for gamma, earlier in zip(gammas, reversed(state.history), strict=False):
                seen = seen + gamma.to(x.dtype) * earlier
            low = F.linear(seen, self.row("down", layer).to(x.dtype))
            kept = x + F.linear(low, self.row("up", layer).to(x.dtype))
        if self.weights:
            a, b = (2 * torch.sigmoid(self.row("weight_logits", layer))).to(x.dtype).unbind()
            output, kept = a * output, b * kept
        after: State = super().write(state, layer, output + (kept - x))
        history = (*state.history, x)[-self.previous :] if self.previous else ()
        return after._replace(history=history)

    def tensor_names(self, state: State, layer: int) -> list[str]:
        return [f"stream {layer}", *(f"stream {layer - i}" for i in range(len(state.history), 0, -1))]

    def read_flops(self, layer: int) -> int:
        if layer == self.num_layers:
            return 0
        return (4 * self.rank + 2 * min(self.previous, layer) + 2 * self.weights) * self.dim

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, weights={self.weights}, rank={self.rank}, previous={self.previous}"
