"""Gradients in chains: each op reads its sources and hands them on.

A source has one reader a layer or a block. Autograd sums a tensor's gradients with one add, three rows of traffic, for
every reader after the first. A chained op returns its sources too, and the next reader takes what was returned: a
source's gradient is then a chain in which each backward kernel adds its part to what later readers left.

While torch.compile traces, kernels are called as custom ops, opaque to it. Otherwise they are called as functions: the
dispatch of a custom op takes longer than many a kernel runs.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def called(function: Callable[..., Any], op: Callable[..., Any]) -> Callable[..., Any]:
    """How a kernel is called: as the custom op while somebody traces."""
    return op if torch.compiler.is_compiling() else function


def handed_on(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The sources as results: autograd makes the views itself, but not while torch.compile traces."""
    return tuple(t.view_as(t) for t in tensors) if torch.compiler.is_compiling() else tuple(tensors)


def or_zeros(gradients: Sequence[Tensor | None], like: Tensor) -> list[Tensor]:
    """Gradients with zeros for the missing ones; the zeros are one tensor."""
    if all(gradient is not None for gradient in gradients):
        return list(gradients)  # type: ignore[arg-type]
    zeros = torch.zeros_like(like)
    return [zeros if gradient is None else gradient for gradient in gradients]


def left_by_later_readers(gradients: Sequence[Tensor | None], like: Tensor) -> list[Tensor]:
    return [] if all(gradient is None for gradient in gradients) else or_zeros(gradients, like)
