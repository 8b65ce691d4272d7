"""Highway: a learned gate per channel decides how much of a layer's output replaces the stream.

    x_{l+1} = T_l * F_l(norm(x_l)) + (1 - T_l) * x_l,    T_l = sigmoid(W_l x_l + b_l)

Srivastava et al., arXiv 1505.00387, equation 3, around the layers of a Transformer, which keep their input norms. The
bias starts negative, so that a layer at first mostly carries its input on; W starts at zero here, so that every token
starts with the same gate.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import UsageError
from ..registry import register
from .prenorm import PreNorm, SumState


@register("highway")
class Highway(PreNorm):
    """Highway connection.

    Args:
        dim: width D.
        num_layers: L; every attention and every MLP is one layer.
        gate_bias: the gates' bias at the start, negative to carry the stream on: -1 to -3 is usual.

    Parameters: gate_weight [L, D, D], zeros at init, and gate_bias [L, D]: a matrix a layer. Raises UsageError for
    a bias that is not finite.
    """

    layer_parameters = ("gate_weight", "gate_bias")

    def __init__(self, dim: int, num_layers: int, *, gate_bias: float = -2.0) -> None:
        super().__init__(dim, num_layers)
        if not abs(gate_bias) < float("inf"):
            raise UsageError(f"gate_bias must be a finite number such as -2; it is {gate_bias}")
        self.initial_bias = gate_bias
        self.gate_weight = nn.Parameter(torch.empty(num_layers, dim, dim))
        self.gate_bias = nn.Parameter(torch.empty(num_layers, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.gate_weight)
        nn.init.constant_(self.gate_bias, self.initial_bias)

    def write(self, state: SumState, layer: int, output: Tensor) -> SumState:
        x = state.stream
        weight, bias = (self.row(name, layer).to(x.dtype) for name in ("gate_weight", "gate_bias"))
        gate = torch.sigmoid(F.linear(x, weight, bias))
        return super().write(state, layer, gate * (output - x))

    def read_flops(self, layer: int) -> int:
        return 2 * self.dim**2 + 3 * self.dim if layer < self.num_layers else 0

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, gate_bias={self.initial_bias}"
