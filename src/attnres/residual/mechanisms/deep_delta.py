"""Deep Delta Learning with a scalar state per direction (d_v = 1): a layer overwrites the stream along its own output.

    x_{l+1} = x_l + beta_l k_l (v_l - k_l . x_l)
    k_l     = F_l(norm(x_l)) / |F_l(norm(x_l))|
    beta_l  = 2 sigmoid(w_beta . RMSNorm(x_l) + b_beta)        0: keep, 1: replace, 2: reflect
    v_l     = 4 sigmoid(w_v . x_l + b_v)

The layer's output gives the direction k alone; what stands along it is read, erased and replaced by v. arXiv
2601.00417 and the authors' code (yifanzhang-pro/deep-delta-learning, the d_v = 1 model); beta there reads the layer's
normalised input, whose norm weight w_beta absorbs. There both w start normal, here zero, so that every token starts
with the same beta and v = 2.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ...errors import UsageError
from ...ops.formulas import statistics_dtype
from ..registry import register
from .prenorm import PreNorm, SumState

LENGTH_EPS = 1e-5
"""Smallest length of an output that counts as a direction."""


@register("delta")
class Delta(PreNorm):
    """Deep Delta Learning, d_v = 1.

    Args:
        dim: width D.
        num_layers: L; every attention and every MLP is one layer.
        beta_init: beta at the start, between 0 (the stream stays) and 2 (it is reflected).
        eps: of the RMSNorm that beta reads.

    Parameters: beta_weight, value_weight [L, D] and value_bias [L, 1], zeros at init; beta_bias [L, 1],
    logit(beta_init / 2). Raises UsageError for bad values.
    """

    layer_parameters = ("beta_weight", "beta_bias", "value_weight", "value_bias")

    def __init__(self, dim: int, num_layers: int, *, beta_init: float = 1.0, eps: float = 1e-6) -> None:
        super().__init__(dim, num_layers)
        if not 0 < beta_init < 2:
            raise UsageError(f"beta_init must be between 0 and 2; it is {beta_init}")
        if not eps >= 0:
            raise UsageError(f"eps must be zero or positive; it is {eps}")
        self.beta_init = beta_init
        self.eps = eps
        self.beta_weight = nn.Parameter(torch.empty(num_layers, dim))
        self.beta_bias = nn.Parameter(torch.empty(num_layers, 1))
        self.value_weight = nn.Parameter(torch.empty(num_layers, dim))
        self.value_bias = nn.Parameter(torch.empty(num_layers, 1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for parameter in self.parameters():
            nn.init.zeros_(parameter)
        nn.init.constant_(self.beta_bias, math.log(self.beta_init / (2 - self.beta_init)))

    def write(self, state: SumState, layer: int, output: Tensor) -> SumState:
        dtype = statistics_dtype(output.dtype)
        rows = (self.row(name, layer).to(dtype) for name in self.layer_parameters)
        beta_weight, beta_bias, value_weight, value_bias = rows
        x, direction = state.stream.to(dtype), output.to(dtype)
        k = direction * torch.rsqrt(direction.square().sum(-1, keepdim=True) + LENGTH_EPS**2)
        inverse_rms = torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        beta = 2 * torch.sigmoid((x * beta_weight).sum(-1, keepdim=True) * inverse_rms + beta_bias)
        value = 4 * torch.sigmoid((x * value_weight).sum(-1, keepdim=True) + value_bias)
        update = beta * (value - (k * x).sum(-1, keepdim=True)) * k
        return super().write(state, layer, update.to(output.dtype))

    def read_flops(self, layer: int) -> int:
        # the length of the output, three dot products, the RMS and two scalings
        return 12 * self.dim if layer < self.num_layers else 0

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, beta_init={self.beta_init}, eps={self.eps}"
