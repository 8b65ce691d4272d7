"""Hyper-Connections: n residual streams with learned depth and width connections (arXiv 2409.19606, algorithm 1).

    h  = A_m^T H,    H' = A_r^T H + B^T F(h)      H in R^{n x D}; A_m in R^{n x 1}, A_r in R^{n x n}, B in R^{1 x n}

Static: the three are parameters. Dynamic, with H^ = the streams, each normalised:

    B(H)   = s_beta  tanh(H^ W_beta)^T + B        W_beta in R^{D x 1}
    A_m(H) = s_alpha tanh(H^ W_m) + A_m           W_m in R^{D x 1}
    A_r(H) = s_alpha tanh(H^ W_r) + A_r           W_r in R^{D x n}

A_r has a row for each source and a column for each target. The norm is an RMSNorm without weight (the paper takes that
of its host model; a weight would only scale the rows of W). At init the function is that of PreNorm over the same
layers: layer l reads stream l mod n, all streams take every output, and the final norm takes the factor n of the sum
away.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...ops.formulas import statistics_dtype
from ..registry import register
from ..streams import StreamResidual, project

NORM_EPS = 1e-6
SCALE = 0.01


@register("hyper_connections")
class HyperConnections(StreamResidual):
    """Hyper-Connections.

    Args:
        dim: width D.
        num_layers: L; every attention and every MLP is one layer.
        num_streams: n, how many residual streams there are.
        dynamic: coefficients depend on the token; else they are parameters alone.

    Parameters (row i = layer i):
        beta [L, n]: B, ones at init.
        alpha_m [L, n]: A_m, one at stream i mod n.
        alpha_r [L, n, n]: A_r, the identity.
        projection [L, n + 2, D]: rows of W_beta, W_m and W_r in turn, zeros at init; dynamic only.
        scale [L, 2]: s_beta and s_alpha, 0.01 at init; dynamic only.

    The matrices that write to the streams start larger by the root of n, as in the paper. Raises UsageError for less
    than one stream.
    """

    def __init__(self, dim: int, num_layers: int, *, num_streams: int = 4, dynamic: bool = True) -> None:
        super().__init__(dim, num_layers, num_streams)
        n = num_streams
        self.dynamic = dynamic
        self.beta = nn.Parameter(torch.empty(num_layers, n))
        self.alpha_m = nn.Parameter(torch.empty(num_layers, n))
        self.alpha_r = nn.Parameter(torch.empty(num_layers, n, n))
        self.layer_parameters = ("beta", "alpha_m", "alpha_r")
        if dynamic:
            self.projection = nn.Parameter(torch.empty(num_layers, n + 2, dim))
            self.scale = nn.Parameter(torch.empty(num_layers, 2))
            self.layer_parameters += ("projection", "scale")
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.beta.fill_(1)
        self.alpha_m.zero_()
        for row, streams in enumerate(self.alpha_m):
            streams[(self.first_layer + row) % self.num_streams] = 1
        self.alpha_r.copy_(torch.eye(self.num_streams))
        if self.dynamic:
            self.projection.zero_()
            self.scale.fill_(SCALE)

    def init_scale(self, role: str) -> float:
        return super().init_scale(role) * (self.num_streams**0.5 if role == "output" else 1.0)

    def coefficients(self, streams: Tensor, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        dtype = statistics_dtype(streams.dtype)
        beta, alpha_m, alpha_r = (self.row(name, layer).to(dtype) for name in ("beta", "alpha_m", "alpha_r"))
        if self.dynamic:
            moved = torch.tanh(project(streams, self.row("projection", layer), NORM_EPS))
            scale = self.row("scale", layer).to(dtype)
            beta = beta + scale[0] * moved[..., 0]
            alpha_m = alpha_m + scale[1] * moved[..., 1]
            alpha_r = alpha_r + scale[1] * moved[..., 2:]
        return alpha_m, alpha_r.mT, beta

    def read_flops(self, layer: int) -> int:
        n = self.num_streams
        projected = 2 * n * (n + 2) * self.dim if self.dynamic and layer < self.num_layers else 0
        return super().read_flops(layer) + projected

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, dynamic={self.dynamic}"
