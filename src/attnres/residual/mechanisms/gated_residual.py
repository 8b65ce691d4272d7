"""Gated Residual (Qwen3.8-Flash-Next): n streams, read through gates per channel, written through one gate per stream.

    s^_i = RMSNorm_i(s_i)                                          i = 1 .. n, concatenated: s^ in R^{nD}
    w    = sigmoid(W_up silu(W_down s^ / n))                       W_down [r, nD], W_up [nD, r]
    h    = mean_i w_i * s^_i                                       what the layer sees, without another norm
    s_i  = s_i + 2 sigmoid(W_inject s^ / n)_i F(h)                 W_inject [n, nD]

The streams start as n copies of the embedding and are never mixed but through layers. The output head reads in the same
way, without a norm of its own. Qwen3.8-Flash-Next technical report, arXiv 2608.30320, and public ports of the model,
which has n = 4 and r = 320 at width 2560.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ... import ops
from ...errors import UsageError, check_counts
from ..base import Residual, check_turn, normed
from ..registry import register

INIT_STD = 0.02


class GatedState(NamedTuple):
    """streams: [..., n, D]; gates: those of the coming write, [..., n], between a read and its write."""

    streams: Tensor
    gates: Tensor | None


@register("gated_residual")
class GatedResidual(Residual):
    """Gated Residual.

    Args:
        dim: width D.
        num_layers: L; every attention and every MLP is one layer.
        num_streams: n, how many residual streams there are.
        rank: r, inner width of the read gates; the default is D / 8.
        eps: of the norms on the streams.

    Parameters (row i = layer i, last row = the read in front of the output head):
        stream_norm [L + 1, n, D]: weights of the RMSNorms on the streams, ones at init.
        gate_down [L + 1, r, n D], gate_up [L + 1, n D, r]: normal with deviation 0.02, which tells the streams apart.
        inject [L, n, n D]: the same.

    Layers have no input norms. Raises UsageError for bad values.
    """

    pre_norm = False
    layer_parameters = ("stream_norm", "gate_down", "gate_up", "inject")

    def __init__(
        self, dim: int, num_layers: int, *, num_streams: int = 4, rank: int | None = None, eps: float = 1e-6
    ) -> None:
        super().__init__(dim, num_layers)
        rank = max(1, dim // 8) if rank is None else rank
        check_counts(num_streams=num_streams, rank=rank)
        if not eps >= 0:
            raise UsageError(f"eps must be zero or positive; it is {eps}")
        self.num_streams, self.rank, self.eps = num_streams, rank, eps
        wide = num_streams * dim
        self.stream_norm = nn.Parameter(torch.empty(num_layers + 1, num_streams, dim))
        self.gate_down = nn.Parameter(torch.empty(num_layers + 1, rank, wide))
        self.gate_up = nn.Parameter(torch.empty(num_layers + 1, wide, rank))
        self.inject = nn.Parameter(torch.empty(num_layers, num_streams, wide))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.stream_norm)
        for matrix in (self.gate_down, self.gate_up, self.inject):
            nn.init.normal_(matrix, std=INIT_STD)

    def start(self, embedding: Tensor) -> GatedState:
        return GatedState(embedding.unsqueeze(-2).expand(*embedding.shape[:-1], self.num_streams, self.dim), None)

    def read(self, state: GatedState, layer: int, norm: nn.Module | None = None) -> tuple[Tensor, GatedState]:
        streams, dtype = state.streams, state.streams.dtype
        unit = ops.rms_norm(streams, (None, self.eps)) * self.row("stream_norm", layer).to(dtype)
        wide = unit.flatten(-2) / self.num_streams
        inner = F.silu(F.linear(wide, self.row("gate_down", layer).to(dtype)))
        weights = torch.sigmoid(F.linear(inner, self.row("gate_up", layer).to(dtype))).unflatten(-1, unit.shape[-2:])
        gates = None
        if layer < self.num_layers:
            gates = 2 * torch.sigmoid(F.linear(wide, self.row("inject", layer).to(dtype)))
        return normed((weights * unit).mean(-2), norm), GatedState(streams, gates)

    def write(self, state: GatedState, layer: int, output: Tensor) -> GatedState:
        check_turn(state.gates is not None, "write", layer)
        assert state.gates is not None
        return GatedState(state.streams + state.gates.unsqueeze(-1) * output.unsqueeze(-2), None)

    def latest(self, state: GatedState) -> Tensor:
        return state.streams

    def read_flops(self, layer: int) -> int:
        wide = self.num_streams * self.dim
        read = 4 * self.rank * wide + 3 * wide
        return read + (2 * self.num_streams * wide + wide if layer < self.num_layers else 0)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, num_streams={self.num_streams}, rank={self.rank}, eps={self.eps}"
