"""SiameseNorm: a post-norm and a pre-norm stream share the layers, so that each of them is trained by both.

    x^_l    = RMSNorm_{x,l}(x_l)
    o_l     = F_l(norm_l(x^_l + RMSNorm_{y,l}(y_l)))
    x_{l+1} = x^_l + o_l / c_l,    c_l = sqrt(2 (floor(l / 2) + 1))
    y_{l+1} = y_l + o_l

and the output head's norm sees x^_L + RMSNorm_{y,L}(y_L). Both streams start as the embedding; floor(l / 2) is layer
l's Transformer block. arXiv 2602.08064 and the authors' code (Qwen-Applications/SiameseNorm; there LayerNorm).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ... import ops
from ...errors import UsageError
from ..base import Residual, check_turn, normed
from ..registry import register


class SiameseState(NamedTuple):
    """post, pre: the post-norm and the pre-norm stream, [..., D] each; normalised: x^, between a read and its write."""

    post: Tensor
    pre: Tensor
    normalised: Tensor | None


@register("siamesenorm")
class SiameseNorm(Residual):
    """SiameseNorm.

    Args:
        dim: width D.
        num_layers: L; every attention and every MLP is one layer.
        eps: of the norms on the streams.

    Parameters (row i = layer i, last row = the read in front of the output head), ones at init:
        norm_post, norm_pre [L + 1, D]: weights of the RMSNorms on the two streams, beside the layers' input norms.

    Raises UsageError for a negative eps.
    """

    layer_parameters = ("norm_post", "norm_pre")

    def __init__(self, dim: int, num_layers: int, *, eps: float = 1e-6) -> None:
        super().__init__(dim, num_layers)
        if not eps >= 0:
            raise UsageError(f"eps must be zero or positive; it is {eps}")
        self.eps = eps
        self.norm_post = nn.Parameter(torch.empty(num_layers + 1, dim))
        self.norm_pre = nn.Parameter(torch.empty(num_layers + 1, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.norm_post)
        nn.init.ones_(self.norm_pre)

    def start(self, embedding: Tensor) -> SiameseState:
        return SiameseState(embedding, embedding, None)

    def read(self, state: SiameseState, layer: int, norm: nn.Module | None = None) -> tuple[Tensor, SiameseState]:
        post = ops.rms_norm(state.post, (self.row("norm_post", layer), self.eps))
        h = post + ops.rms_norm(state.pre, (self.row("norm_pre", layer), self.eps))
        return normed(h, norm), SiameseState(state.post, state.pre, post)

    def write(self, state: SiameseState, layer: int, output: Tensor) -> SiameseState:
        check_turn(state.normalised is not None, "write", layer)
        assert state.normalised is not None
        return SiameseState(state.normalised + output / math.sqrt(2 * (layer // 2 + 1)), state.pre + output, None)

    def latest(self, state: SiameseState) -> Tensor:
        return state.pre

    def read_flops(self, layer: int) -> int:
        return 3 * self.dim if layer < self.num_layers else self.dim

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, eps={self.eps}"
