"""LayerScale: each channel of a layer's output enters the stream through a learned factor that starts near zero.

    x_{l+1} = x_l + lambda_l * F_l(norm(x_l)),    lambda_l in R^D

Touvron et al. (CaiT), arXiv 2103.17239, section 2. The factors start at 0.1 up to 18 Transformer blocks, at 1e-5 up to
24 and at 1e-6 beyond.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...errors import UsageError
from ..registry import register
from .prenorm import PreNorm, SumState


@register("layerscale")
class LayerScale(PreNorm):
    """LayerScale.

    Args:
        dim: width D.
        num_layers: L; every attention and every MLP is one layer.
        init: the factors' first value; the default is the paper's, by depth: 0.1 up to 36 layers, 1e-5 up to 48, 1e-6
            beyond.

    Parameters: scale [L, D]. Raises UsageError for a factor of zero, at which neither factors nor layers would learn
    at the same time (that is ReZero).
    """

    layer_parameters = ("scale",)

    def __init__(self, dim: int, num_layers: int, *, init: float | None = None) -> None:
        super().__init__(dim, num_layers)
        if init is None:
            init = 0.1 if num_layers <= 36 else 1e-5 if num_layers <= 48 else 1e-6
        if not init > 0:
            raise UsageError(f"init must be above zero; it is {init} (rezero starts at zero)")
        self.init = init
        self.scale = nn.Parameter(torch.empty(num_layers, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.scale, self.init)

    def write(self, state: SumState, layer: int, output: Tensor) -> SumState:
        return super().write(state, layer, output * self.row("scale", layer).to(output.dtype))

    def read_flops(self, layer: int) -> int:
        return self.dim if layer < self.num_layers else 0

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, init={self.init}"
