"""Low-rank AttnRes: keys of r channels, values of all (LR-AttnRes, sliced keys, arXiv 2607.09694).

    h = sum_i softmax_i(w . RMSNorm(v_i[D - r :])) v_i          w in R^r

The last r channels of a source are its key, so a read computes its logits from r / D of the numbers and the
pseudo-query is as much smaller. r = D is AttnRes. The paper's other form, keys projected to r channels, is not here.
"""

from __future__ import annotations

import torch
from torch import nn

from ...errors import UsageError
from ..registry import register
from .block_attnres import BlockAttnRes


@register("lowrank_attnres")
class LowRankAttnRes(BlockAttnRes):
    """Low-rank AttnRes.

    Args:
        dim: width D.
        num_layers: L; every attention and every MLP is one layer.
        rank: r, channels of a key, at most D; the default is D / 4, at least 1.
        block_size: layers in a block; 1 is Full.
        eps: of the key norms.
        stream_scale: multiply each read by its number of sources.

    Parameters (row i = layer i, last row = the output read): pseudo_query [L + 1, r], zeros at init; key_norm
    [L + 1, r], ones. Raises UsageError for bad values.
    """

    def __init__(
        self,
        dim: int,
        num_layers: int,
        *,
        rank: int | None = None,
        block_size: int = 1,
        eps: float = 1e-6,
        stream_scale: bool = False,
    ) -> None:
        super().__init__(
            dim, num_layers, block_size=block_size, eps=eps, stream_scale=stream_scale, schedule="layerwise"
        )
        rank = max(1, dim // 4) if rank is None else rank
        if not isinstance(rank, int) or not 1 <= rank <= dim:
            raise UsageError(f"rank must be a whole number from 1 to the width, {dim}; it is {rank!r}")
        self.rank, self.fused = rank, False
        self.pseudo_query = nn.Parameter(torch.empty(num_layers + 1, rank))
        self.key_norm = nn.Parameter(torch.empty(num_layers + 1, rank))
        self.reset_parameters()

    def read_flops(self, layer: int) -> int:
        count = self.num_sources(layer)
        return (4 * self.rank + 2 * self.dim) * count if count > 1 else 0

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}"
