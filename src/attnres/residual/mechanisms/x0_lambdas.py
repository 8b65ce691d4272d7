"""Two scalars a layer: one for the stream, one for the embedding, which every layer is given anew.

    x_l <- a_l x_l + b_l x_0,    then x_{l+1} = x_l + F_l(norm(x_l))

x_0 is the embedding. The small public trainers (modded-nanogpt, nanochat) do this in front of every Transformer block,
with an embedding that they have normalised; here it is every layer, and the embedding is as it is. At init a = 1 and
b = 0, which is PreNorm.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...ops.formulas import mix, statistics_dtype
from ..base import Residual, check_turn, normed
from ..registry import register


class LambdaState(NamedTuple):
    """embedding: x_0, [..., D]; unread: the stream in front of a layer, before its scalars; stream: the same after
    them, to which the layer adds. One of the two is None."""

    embedding: Tensor
    unread: Tensor | None
    stream: Tensor | None


@register("x0_lambdas")
class X0Lambdas(Residual):
    """Scalars on the stream and on the embedding.

    Args:
        dim: width D.
        num_layers: L; every attention and every MLP is one layer.

    Parameters: lambdas [L, 2], a and b of every layer, (1, 0) at init. The output head's norm sees the plain stream.
    """

    layer_parameters = ("lambdas",)

    def __init__(self, dim: int, num_layers: int) -> None:
        super().__init__(dim, num_layers)
        self.lambdas = nn.Parameter(torch.empty(num_layers, 2))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.lambdas[:, 0] = 1.0
        self.lambdas[:, 1] = 0.0

    def start(self, embedding: Tensor) -> LambdaState:
        return LambdaState(embedding, embedding, None)

    def read(self, state: LambdaState, layer: int, norm: nn.Module | None = None) -> tuple[Tensor, LambdaState]:
        check_turn(state.unread is not None, "read", layer)
        assert state.unread is not None
        weights = self.row("lambdas", layer).to(statistics_dtype(state.unread.dtype))
        stream = mix(weights, (state.unread, state.embedding))
        return normed(stream, norm), LambdaState(state.embedding, None, stream)

    def write(self, state: LambdaState, layer: int, output: Tensor) -> LambdaState:
        check_turn(state.stream is not None, "write", layer)
        assert state.stream is not None
        return LambdaState(state.embedding, state.stream + output, None)

    def latest(self, state: LambdaState) -> Tensor:
        latest = state.unread if state.stream is None else state.stream
        assert latest is not None
        return latest

    def finish(self, state: LambdaState, norm: nn.Module | None = None) -> Tensor:
        return normed(self.latest(state), norm)

    def tensor_names(self, state: LambdaState, layer: int) -> list[str]:
        return ["embedding", f"stream {layer}"]

    def read_flops(self, layer: int) -> int:
        return 3 * self.dim if layer < self.num_layers else 0
