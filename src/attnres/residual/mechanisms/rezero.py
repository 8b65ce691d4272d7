"""ReZero: each layer enters the stream through one learned factor that starts at zero, and there are no norms.

    x_{l+1} = x_l + alpha_l F_l(x_l)

Bachlechner et al., arXiv 2003.04887, section 3. Their code shares one alpha between the attention and the MLP of a
Transformer block; here, as in the formula, every layer has its own. The network is the identity at the start: the
factors learn first, the layers from the second step on.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..registry import register
from .prenorm import PreNorm, SumState


@register("rezero")
class ReZero(PreNorm):
    """ReZero.

    Args:
        dim: width D.
        num_layers: L; every attention and every MLP is one layer.
        input_norms: keep the norms in front of layers and output head, x + alpha F(norm(x)). Without them layers see
            embeddings at their own scale, which is small where embeddings are tied to the output head.

    Parameters: alpha [L, 1], zeros at init.
    """

    layer_parameters = ("alpha",)

    def __init__(self, dim: int, num_layers: int, *, input_norms: bool = False) -> None:
        super().__init__(dim, num_layers)
        self.pre_norm = input_norms
        self.alpha = nn.Parameter(torch.empty(num_layers, 1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.alpha)

    def write(self, state: SumState, layer: int, output: Tensor) -> SumState:
        return super().write(state, layer, output * self.row("alpha", layer).to(output.dtype))

    def read_flops(self, layer: int) -> int:
        return self.dim if layer < self.num_layers else 0

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, input_norms={self.pre_norm}"
