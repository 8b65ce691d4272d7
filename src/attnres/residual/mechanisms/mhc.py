"""Manifold-Constrained Hyper-Connections: the streams are mixed by doubly stochastic matrices (mHC, arXiv 2512.24880).

    x^   = RMSNorm(vec(H))                                  vec(H) in R^{nD}
    pre  = sigmoid(a_pre x^ phi_pre + b_pre)                phi_pre in R^{nD x n}
    post = 2 sigmoid(a_post x^ phi_post + b_post)           phi_post in R^{nD x n}
    M    = Sinkhorn(exp(a_res mat(x^ phi_res) + b_res))     phi_res in R^{nD x n^2}; columns, then rows, 20 times

    h  = pre . H,    H' = M H + post^T F(h)

Rows and columns of M sum to one and no entry is negative, so a product of any number of them neither grows nor shrinks
the mean over the streams. Sinkhorn runs on logarithms of n x n numbers a token. The paper does not publish its initial
biases; these are those of a public implementation (FFTYYY/mhc-lite): near the identity, but not PreNorm. There Sinkhorn
converges slowly once learning breaks the symmetry: logits moved by 0.1 leave column sums up to 1e-3 from one after 20
iterations, where logits of that size around equal ones leave 1e-7.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...errors import check_counts
from ..registry import register
from ..sinkhorn import sinkhorn
from ..streams import StreamResidual, project

NORM_EPS = 1e-20
GATE = 0.01
OFF_DIAGONAL = -8.0


class GatedStreams(StreamResidual):
    """Streams whose coefficients are gated functions of all of them; how M comes from its logits is left open.

    Parameters (row i = layer i; m = 2 n + the number of logits of M, in the order pre, post, res):
        projection [L, m, n D]: phi, zeros at init.
        bias [L, m]: b; pre and post are 1 at stream i mod n and -1 elsewhere at init.
        gate [L, 3]: a, 0.01 at init.
    """

    layer_parameters = ("projection", "bias", "gate")

    def __init__(self, dim: int, num_layers: int, num_streams: int, num_logits: int) -> None:
        super().__init__(dim, num_layers, num_streams)
        wide = 2 * num_streams + num_logits
        self.num_logits = num_logits
        self.projection = nn.Parameter(torch.empty(num_layers, wide, num_streams * dim))
        self.bias = nn.Parameter(torch.empty(num_layers, wide))
        self.gate = nn.Parameter(torch.empty(num_layers, 3))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        n = self.num_streams
        nn.init.zeros_(self.projection)
        nn.init.constant_(self.gate, GATE)
        self.bias[:, : 2 * n] = -1
        for row, bias in enumerate(self.bias):
            stream = (self.first_layer + row) % n
            bias[stream] = bias[n + stream] = 1
        self.bias[:, 2 * n :] = self.initial_logits().to(self.bias.device)

    def initial_logits(self) -> Tensor:
        """b_res at init, [number of logits of M]."""
        raise NotImplementedError

    def mixing(self, logits: Tensor) -> Tensor:
        """M [..., n, n] from its logits [..., number of them]."""
        raise NotImplementedError

    def coefficients(self, streams: Tensor, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        n = self.num_streams
        projected = project(streams.flatten(-2), self.row("projection", layer), NORM_EPS)
        gate, bias = (self.row(name, layer).to(projected.dtype) for name in ("gate", "bias"))
        pre, post, res = (
            a * x + b
            for a, x, b in zip(
                gate, projected.split((n, n, self.num_logits), -1), bias.split((n, n, self.num_logits)), strict=True
            )
        )
        return torch.sigmoid(pre), self.mixing(res), 2 * torch.sigmoid(post)

    def read_flops(self, layer: int) -> int:
        projected = 2 * self.num_streams * self.dim * (2 * self.num_streams + self.num_logits)
        return super().read_flops(layer) + (projected if layer < self.num_layers else 0)


@register("mhc")
class ManifoldHyperConnections(GatedStreams):
    """mHC.

    Args:
        dim: width D.
        num_layers: L; every attention and every MLP is one layer.
        num_streams: n, how many residual streams there are.
        iterations: of Sinkhorn's normalisation of columns and rows.

    Parameters (row i = layer i), in the order pre, post, res:
        projection [L, 2 n + n^2, n D]: phi, zeros at init.
        bias [L, 2 n + n^2]: b; pre and post 1 at stream i mod n and -1 elsewhere, res 0 on the diagonal and -8 off it.
        gate [L, 3]: a, 0.01 at init.

    Raises UsageError for less than one stream or iteration.
    """

    def __init__(self, dim: int, num_layers: int, *, num_streams: int = 4, iterations: int = 20) -> None:
        check_counts(iterations=iterations)
        self.iterations = iterations
        super().__init__(dim, num_layers, num_streams, num_streams**2 if isinstance(num_streams, int) else 0)

    def initial_logits(self) -> Tensor:
        return (OFF_DIAGONAL * (1 - torch.eye(self.num_streams))).flatten()

    def mixing(self, logits: Tensor) -> Tensor:
        return sinkhorn(logits.unflatten(-1, (self.num_streams, self.num_streams)), self.iterations)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, iterations={self.iterations}"
