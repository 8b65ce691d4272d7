"""Post-norm streams: the norm is behind the addition, on the stream itself.

x_{l+1} = RMSNorm_l(alpha x_l + F_l(x_l))

For alpha > 1 it is computed as the norm of x_l + F_l / alpha with eps / alpha^2, which is the same: alpha x_l, with an
alpha as large as the network is deep, may be beyond the range of fp16.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ... import ops
from ...errors import UsageError
from .prenorm import PreNorm, SumState


class PostNorm(PreNorm):
    """Base of the mechanisms that normalise the stream after each addition.

    Parameters: post_norm [L, D], the weights of those RMSNorms, ones at init. alpha weighs the stream in the addition.
    """

    layer_parameters = ("post_norm",)

    def __init__(self, dim: int, num_layers: int, alpha: float, eps: float) -> None:
        super().__init__(dim, num_layers)
        if not 0 < alpha < float("inf"):
            raise UsageError(f"alpha must be a positive number; it is {alpha}")
        if not eps >= 0:
            raise UsageError(f"eps must be zero or positive; it is {eps}")
        self.alpha = alpha
        self.eps = eps
        self.post_norm = nn.Parameter(torch.empty(num_layers, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.post_norm)

    def write(self, state: SumState, layer: int, output: Tensor) -> SumState:
        weight, alpha = self.row("post_norm", layer), self.alpha
        if alpha > 1:
            _, stream = ops.add_norm(state.stream, output / alpha, norm=(weight, self.eps / alpha**2))
        else:
            _, stream = ops.add_norm(alpha * state.stream, output, norm=(weight, self.eps))
        return SumState(stream, None)

    def read_flops(self, layer: int) -> int:
        return self.dim if layer < self.num_layers else 0

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, alpha={self.alpha:.4g}, eps={self.eps}"
