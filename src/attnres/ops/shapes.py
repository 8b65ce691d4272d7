"""What the fused kernels return and keep for the backward pass, and nothing computed: for tensors without data.

Planning a run asks for shapes and bytes alone, and a read over two hundred sources that no one looks at would take
thousands of operations on fake tensors. Only `dispatch.shapes_only` selects this; there is no backward pass.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .eager import inter_block, inter_block_threaded, merge, merge_norm
from .reference import Norm, statistics_dtype

__all__ = [
    "add_norm",
    "depth_attention",
    "inter_block",
    "inter_block_threaded",
    "merge",
    "merge_norm",
    "read_norm",
    "read_norm_threaded",
    "rms_norm",
]


class _Read(torch.autograd.Function):
    """One read keeps its sources, its parameters and 2n + 2 numbers a token."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key_norm: Tensor, weight: Tensor | None, *sources: Tensor) -> Tensor:
        kept = sources[0].new_empty(
            (*sources[0].shape[:-1], 2 * len(sources) + 2), dtype=statistics_dtype(sources[0].dtype)
        )
        ctx.save_for_backward(query, key_norm, weight, kept, *sources)
        return torch.empty_like(sources[0])


class _Norm(torch.autograd.Function):
    """A norm keeps its input, its weight and a number a token."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor | None) -> Tensor:
        ctx.save_for_backward(h, weight, _statistic(h))
        return torch.empty_like(h)


def depth_attention(
    query: Tensor,
    sources: Sequence[Tensor],
    key_norm: Tensor,
    eps: float = 1e-6,
    return_weights: bool = False,
    *,
    scale: float = 1.0,
) -> Tensor | tuple[Tensor, Tensor]:
    h = _Read.apply(query, key_norm, None, *sources)
    return (h, torch.stack([_statistic(source) for source in sources])) if return_weights else h


def read_norm(
    query: Tensor, sources: Sequence[Tensor], key_norm: Tensor, eps: float, *, scale: float, norm: Norm | None
) -> Tensor:
    return _Read.apply(query, key_norm, None if norm is None else norm[0], *sources)


def read_norm_threaded(
    query: Tensor,
    sources: Sequence[Tensor],
    key_norm: Tensor,
    eps: float,
    *,
    scale: float,
    norm: Norm | None,
    prior: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, list[Tensor]]:
    earlier = () if prior is None else prior
    return _Read.apply(query, key_norm, None if norm is None else norm[0], *sources, *earlier), list(sources)


def add_norm(stream: Tensor, update: Tensor, *, norm: Norm | None) -> tuple[Tensor, Tensor]:
    stream = stream + update
    return stream, stream if norm is None else rms_norm(stream, norm)


def rms_norm(h: Tensor, norm: Norm | None) -> Tensor:
    return h if norm is None else _Norm.apply(h, norm[0])


def _statistic(source: Tensor) -> Tensor:
    return source.new_empty(source.shape[:-1], dtype=statistics_dtype(source.dtype))
