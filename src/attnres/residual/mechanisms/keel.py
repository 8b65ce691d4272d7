"""KEEL: post-norm with a stream so heavy that gradients pass it as in a highway, and an input norm in every layer.

    x_{l+1} = RMSNorm_l(alpha x_l + F_l(norm(x_l)))

Chen and Wei, arXiv 2601.19895 (there LayerNorm). alpha defaults to L, the number of layers, which keeps the stream
dominant: an inference from secondary sources, not read in the paper; another public version takes the root of L.
"""

from __future__ import annotations

from ..registry import register
from .postnorm import PostNorm


@register("keel")
class Keel(PostNorm):
    """KEEL.

    Args:
        dim: width D.
        num_layers: L; every attention and every MLP is one layer.
        alpha: weight of the stream in the addition; the default is L.
        eps: of the norms on the stream.

    Parameters: post_norm [L, D], ones at init, beside the layers' input norms. Raises UsageError for bad values.
    """

    def __init__(self, dim: int, num_layers: int, *, alpha: float | None = None, eps: float = 1e-6) -> None:
        super().__init__(dim, num_layers, float(num_layers) if alpha is None else alpha, eps)
