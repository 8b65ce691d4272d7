"""ANCRe: every layer adds to a learned mean of all states before it (adaptive neural connection reassignment, arXiv
2602.09009).

    X_0 = embedding,    X_{i+1} = F_i(norm_i(X_i)) + sum_{j <= i} softmax(c_i / tau)_j X_j

At init c = 0: a layer adds to the uniform mean of X_0 .. X_i, which is not PreNorm. tau = 0.01, so small steps of c
change the wiring. Layer 0 has one state before it and nothing to learn. F_i excludes the shortcut of its own.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ... import ops
from ...errors import UsageError
from ...ops.formulas import statistics_dtype
from ..base import normed
from ..ragged import RaggedResidual
from ..registry import register


class HistoryState(NamedTuple):
    """states: X_0 .. X_i, each [..., D]."""

    states: tuple[Tensor, ...]


@register("ancre")
class ANCRe(RaggedResidual):
    """ANCRe.

    Args:
        dim: width D.
        num_layers: L; every attention and every MLP is one layer.
        temperature: tau, above zero; a smaller one makes the weights move faster.

    Parameters: logits, keyed by the layers 1 .. L - 1: c_i [i + 1], zeros at init. Raises UsageError for a temperature
    that is not positive.
    """

    def __init__(self, dim: int, num_layers: int, *, temperature: float = 0.01) -> None:
        super().__init__(dim, num_layers)
        if not temperature > 0:
            raise UsageError(f"temperature must be above zero; it is {temperature}")
        self.temperature = temperature
        self.logits = nn.ParameterDict(
            {str(layer): nn.Parameter(torch.empty(layer + 1)) for layer in range(1, num_layers)}
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for logits in self.logits.values():
            nn.init.zeros_(logits)

    def start(self, embedding: Tensor) -> HistoryState:
        return HistoryState((embedding,))

    def read(self, state: HistoryState, layer: int, norm: nn.Module | None = None) -> tuple[Tensor, HistoryState]:
        return normed(state.states[-1], norm), state

    def write(self, state: HistoryState, layer: int, output: Tensor) -> HistoryState:
        states = state.states
        if layer == 0:
            return HistoryState((*states, states[0] + output))
        logits = self.logits[str(layer)].to(statistics_dtype(output.dtype))
        weights = (logits / self.temperature).softmax(0)
        mean, handed_on = ops.weighted_sum(weights, states)
        return HistoryState((*handed_on, mean + output))

    def latest(self, state: HistoryState) -> Tensor:
        return state.states[-1]

    def tensor_names(self, state: HistoryState, layer: int) -> list[str]:
        return [f"state {i}" for i in range(len(state.states))]

    def read_flops(self, layer: int) -> int:
        return 2 * (layer + 1) * self.dim if 0 < layer < self.num_layers else 0

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, temperature={self.temperature}"
