"""DeepNorm: post-norm with a heavier stream and smaller initial matrices, made for a thousand layers.

    x_{l+1} = RMSNorm_l(alpha x_l + F_l(x_l)),    alpha = (2M)^(1/4),    beta = (8M)^(-1/4)

for a decoder of M = L / 2 Transformer blocks. Matrices start as Xavier's, those of values, attention outputs and MLPs
scaled by beta. Wang et al., arXiv 2203.00555, section 3 (there LayerNorm). The norm behind the last layer is the one in
front of the output head; the first layer reads the embedding as it is.
"""

from __future__ import annotations

from ...errors import UsageError
from ..registry import register
from .postnorm import PostNorm


@register("deepnorm")
class DeepNorm(PostNorm):
    """DeepNorm.

    Args:
        dim: width D.
        num_layers: L; every attention and every MLP is one layer.
        alpha: weight of the stream in the addition; the default is L^(1/4). With alpha = beta = 1 it is the original
            post-norm Transformer.
        beta: gain of the initial matrices of values, attention outputs and MLPs; the default is (4L)^(-1/4).
        eps: of the norms on the stream.

    Parameters: post_norm [L, D], ones at init; layers have no input norms. Raises UsageError for bad values.
    """

    pre_norm = False
    xavier_init = True

    def __init__(
        self, dim: int, num_layers: int, *, alpha: float | None = None, beta: float | None = None, eps: float = 1e-6
    ) -> None:
        super().__init__(dim, num_layers, num_layers**0.25 if alpha is None else alpha, eps)
        self.beta = (4 * num_layers) ** -0.25 if beta is None else beta
        if not 0 < self.beta < float("inf"):
            raise UsageError(f"beta must be a positive number; it is {beta}")

    def init_scale(self, role: str) -> float:
        return 1.0 if role == "query_key" else self.beta

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, beta={self.beta:.4g}"
