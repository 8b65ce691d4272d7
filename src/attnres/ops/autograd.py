"""What the gradients written by hand have in common."""

from typing import Any

import torch
from torch import Tensor


def differentiates(*tensors: Tensor | None) -> bool:
    """Whether a result of these has a gradient; torch.compile cannot trace a Function whose inputs need none."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def distinct(*inputs: Any) -> tuple[Any, ...]:
    """Inputs of an autograd.Function; views of the tensors for torch.compile if one occurs twice, which it refuses, or
    before torch 2.13 loses a part of its gradient for."""
    if not torch.compiler.is_compiling():
        return inputs
    tensors = [value for value in inputs if isinstance(value, Tensor)]
    if len({*tensors}) == len(tensors):
        return inputs
    return tuple(value.view_as(value) if isinstance(value, Tensor) else value for value in inputs)
