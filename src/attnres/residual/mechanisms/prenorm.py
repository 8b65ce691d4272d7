"""The standard residual: every layer sees the plain sum of everything before it, h_l = sum_{i<l} v_i."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from ... import ops
from ..base import Residual, check_turn, normed, split_norm
from ..registry import register


class SumState(NamedTuple):
    """stream: the sum so far, [..., D]; update: a layer output not yet added to it."""

    stream: Tensor
    update: Tensor | None


@register("prenorm")
class PreNorm(Residual):
    """Plain addition in front of every layer's own norm. No parameters."""

    def start(self, embedding: Tensor) -> SumState:
        return SumState(embedding, None)

    def read(self, state: SumState, layer: int, norm: nn.Module | None = None) -> tuple[Tensor, SumState]:
        if state.update is None:
            return normed(state.stream, norm), state
        fold, rest = split_norm(norm, self.dim)
        stream, x = ops.add_norm(state.stream, state.update, norm=fold)
        return normed(x, rest), state._replace(stream=stream, update=None)

    def write(self, state: SumState, layer: int, output: Tensor) -> SumState:
        check_turn(state.update is None, "write", layer)
        if self.lean:
            return state._replace(stream=state.stream + output, update=None)
        return state._replace(update=output)

    def latest(self, state: SumState) -> Tensor:
        return state.stream if state.update is None else state.stream + state.update
