"""The one place that reads a linear layer's weight instead of calling the layer.

Adapters, quantisers, engines, offloading and hooks put something else in the place of a linear layer, of its forward or
of its weight. What multiplies by the bare weight then computes another function than what calls the layer, without a
word. So whoever wants the matrix asks here, and calls the layer where there is none.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.func import functional_call
from torch.nn import functional as F

from ...residual.base import is_plain


def bare_weight(linear: nn.Module) -> Tensor | None:
    """The matrix W [out, in] if linear(x) is x W^T and nothing more; None if only a call says what it is."""
    if not is_plain(linear, nn.Linear) or linear.bias is not None:
        return None
    weight = linear.weight
    # quantised weights are subclasses of tensors inside an ordinary layer
    return weight if type(weight) in (Tensor, nn.Parameter, FakeTensor) else None  # type: ignore[return-value]


def linear_in(dtype: torch.dtype, linear: nn.Module, x: Tensor) -> Tensor:
    """linear(x) [..., out] for x [..., in], computed in `dtype` whatever that of the parameters, and in it.

    A layer with parameters of other kinds, such as quantised ones, computes in the dtype of its own for this x.
    """
    weight = bare_weight(linear)
    if weight is not None:
        return F.linear(x.to(dtype), weight.to(dtype))
    parameters = dict(linear.named_parameters())
    # an offloaded parameter is on the meta device until the layer is called
    if all(p.dtype in (torch.float16, torch.bfloat16, dtype) and not p.is_meta for p in parameters.values()):
        wide = {name: p.to(dtype) for name, p in parameters.items() if p.dtype != dtype}
        return functional_call(linear, wide, (x.to(dtype),)) if wide else linear(x.to(dtype))
    return linear(x).to(dtype)
