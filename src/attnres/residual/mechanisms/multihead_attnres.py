"""Multi-head AttnRes: every slice of the width attends over depth on its own (MHAR, arXiv 2607.27230).

    h^(a) = sum_i softmax_i(w^(a) . RMSNorm(v_i^(a))) v_i^(a)          a = 1 .. H, slices of D / H channels

h is the concatenation of the slices. Pseudo-queries and key norms are those of AttnRes, cut into H pieces, so that
there is no parameter more; H = 1 is AttnRes, and this is `block_attnres` with `heads`, under a name of its own.
"""

from __future__ import annotations

import math

from ..registry import register
from .block_attnres import BlockAttnRes


@register("multihead_attnres")
class MultiheadAttnRes(BlockAttnRes):
    """Multi-head AttnRes.

    Args:
        dim: width D.
        num_layers: L; every attention and every MLP is one layer.
        heads: H, which divides D; the default is 4, or what D and 4 have in common.
        block_size: layers in a block; 1 is Full.
        eps: of the key norms.
        stream_scale: multiply each read by its number of sources.

    Parameters: those of AttnRes. `depth_weights` are [num_sources, ..., H]. Raises UsageError for bad values.
    """

    def __init__(
        self,
        dim: int,
        num_layers: int,
        *,
        heads: int | None = None,
        block_size: int = 1,
        eps: float = 1e-6,
        stream_scale: bool = False,
    ) -> None:
        heads = math.gcd(4, int(dim)) if heads is None else heads
        super().__init__(dim, num_layers, block_size=block_size, heads=heads, eps=eps, stream_scale=stream_scale)
