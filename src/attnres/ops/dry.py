"""What the fused kernels return and keep for the backward pass, and nothing computed: for tensors without data.

Planning a run asks for shapes and bytes alone, and a read over two hundred sources that no one looks at would take
thousands of operations on fake tensors. Only `dispatch.shapes_only` selects this; there is no backward pass.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .backend import Backend
from .formulas import Norm, Prior, statistics_dtype


class _Read(torch.autograd.Function):
    """One read keeps its sources and what it goes on from, its parameters, and two numbers a source and token and two a
    token."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key_norm: Tensor | None,
        weight: Tensor | None,
        out: Tensor | None,
        lse: Tensor | None,
        *sources: Tensor,
    ) -> Tensor:
        numbers = _statistics(sources[0], 2 * len(sources) + 2)
        ctx.save_for_backward(query, key_norm, weight, out, lse, numbers, *sources)
        return torch.empty_like(sources[0])


class _InterBlock(torch.autograd.Function):
    """Phase 1 keeps its sources, its parameters and fp32 numbers a token: of each query, each source, and each two."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, key_norms: Tensor | None, *sources: Tensor) -> tuple[Tensor, ...]:
        first, n, count = sources[0], len(sources), len(queries)
        lse = _statistics(first, count).movedim(-1, 0)
        ctx.save_for_backward(
            queries, key_norms, lse, _statistics(first, n * count), _statistics(first, n + 1), *sources
        )
        return lse, *(torch.empty_like(first) for _ in range(count if n > 1 else 0))


class _Norm(torch.autograd.Function):
    """A norm keeps its input, its weight and a number a token."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor | None) -> Tensor:
        ctx.save_for_backward(h, weight, _statistics(h))
        return torch.empty_like(h)


class Dry(Backend):
    def read_with_weights(
        self, query: Tensor, sources: Sequence[Tensor], key_norm: Tensor | None, eps: float, scale: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        h = _Read.apply(query, key_norm, None, None, None, *sources)
        return h, _statistics(sources[0], len(sources)).movedim(-1, 0)

    def inter_block(
        self, queries: Tensor, sources: Sequence[Tensor], key_norms: Tensor | None, eps: float
    ) -> tuple[list[Tensor], list[Tensor]]:
        lse, *outs = _InterBlock.apply(queries, key_norms, *sources)
        return outs or [sources[0]] * len(queries), list(lse.unbind(0))

    def read_norm(
        self, query: Tensor, sources: Sequence[Tensor], key_norm: Tensor | None, eps: float, *,
        scale: float = 1.0, norm: Norm | None = None, prior: Prior | None = None,
    ) -> Tensor:  # fmt: skip
        out, lse = prior or (None, None)
        return _Read.apply(query, key_norm, None if norm is None else norm[0], out, lse, *sources)

    def rms_norm(self, h: Tensor, norm: Norm | None) -> Tensor:
        return h if norm is None else _Norm.apply(h, norm[0])


def _statistics(source: Tensor, count: int = 1) -> Tensor:
    """So many numbers a token."""
    return source.new_empty(*source.shape[:-1], count, dtype=statistics_dtype(source.dtype))
