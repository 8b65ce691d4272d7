"""What hyper-connections share: n residual streams, read, mixed and written with coefficients of their own per layer.

    h  = pre . H          what layer l sees, [D]; pre in R^n
    H' = M H + post F(h)  the streams after it, H in R^{n x D}; M in R^{n x n} (row = target), post in R^n

H starts as n copies of the embedding; the output head's norm sees the sum of the streams. What differs is where the
coefficients come from (`coefficients`).
"""

from __future__ import annotations

from abc import abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import check_counts
from ..ops.formulas import statistics_dtype
from .base import Residual, check_turn, normed


class StreamState(NamedTuple):
    """streams: H, [..., n, D]; mixing, post: M [(...,) n, n] and post [(...,) n] of the coming write, between a read
    and its write."""

    streams: Tensor
    mixing: Tensor | None
    post: Tensor | None


class StreamResidual(Residual):
    """n residual streams of width D.

    Coefficients are computed and applied in fp32 (fp64 for fp64 streams); streams keep their dtype.
    """

    def __init__(self, dim: int, num_layers: int, num_streams: int) -> None:
        super().__init__(dim, num_layers)
        check_counts(num_streams=num_streams)
        self.num_streams = num_streams

    @abstractmethod
    def coefficients(self, streams: Tensor, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """(pre [(...,) n], M [(...,) n, n], post [(...,) n]) of `layer` for its input streams [..., n, D]."""

    def start(self, embedding: Tensor) -> StreamState:
        streams = embedding.unsqueeze(-2).expand(*embedding.shape[:-1], self.num_streams, self.dim)
        return StreamState(streams, None, None)

    def read(self, state: StreamState, layer: int, norm: nn.Module | None = None) -> tuple[Tensor, StreamState]:
        pre, mixing, post = self.coefficients(state.streams, layer)
        h = combine(pre.unsqueeze(-2), state.streams).squeeze(-2)
        return normed(h.to(state.streams.dtype), norm), StreamState(state.streams, mixing, post)

    def write(self, state: StreamState, layer: int, output: Tensor) -> StreamState:
        check_turn(state.mixing is not None, "write", layer)
        assert state.mixing is not None and state.post is not None
        streams = torch.addcmul(
            combine(state.mixing, state.streams), state.post.unsqueeze(-1), output.to(state.post.dtype).unsqueeze(-2)
        )
        return StreamState(streams.to(state.streams.dtype), None, None)

    def latest(self, state: StreamState) -> Tensor:
        return state.streams

    def finish(self, state: StreamState, norm: nn.Module | None = None) -> Tensor:
        if norm is None:
            return state.streams.sum(-2)
        return normed(state.streams.mean(-2), norm, float(self.num_streams))  # the sum may be beyond the range of fp16

    def read_flops(self, layer: int) -> int:
        n, dim = self.num_streams, self.dim
        return n * dim if layer == self.num_layers else 2 * (2 * n + n * n) * dim

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, num_streams={self.num_streams}"


def combine(weights: Tensor, streams: Tensor) -> Tensor:
    """weights [(...,) m, n] times streams [..., n, D], in the dtype of the weights: [..., m, D].

    A compiler fuses multiply-adds with what stands before and after, and not a product of many small matrices, which
    is what runs fastest without one.
    """
    with torch.autocast(streams.device.type, enabled=False):
        if not torch.compiler.is_compiling():
            return weights @ streams.to(weights.dtype)
        weights = weights.unsqueeze(-1)
        total = weights[..., 0, :] * streams[..., 0:1, :].to(weights.dtype)
        for i in range(1, streams.shape[-2]):
            total = torch.addcmul(total, weights[..., i, :], streams[..., i : i + 1, :].to(weights.dtype))
        return total


def project(vectors: Tensor, matrix: Tensor, eps: float) -> Tensor:
    """matrix [m, K] times the RMSNorm (without weight) of vectors [..., K]: [..., m] in fp32 (fp64 for fp64).

    The norm divides the product, so that the normalised vectors are never built.
    """
    dtype = statistics_dtype(vectors.dtype)
    with torch.autocast(vectors.device.type, enabled=False):
        x = vectors.to(dtype)
        rstd = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        return F.linear(x, matrix.to(dtype)) * rstd
