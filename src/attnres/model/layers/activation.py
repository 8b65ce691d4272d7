"""The gated activations of MLPs: h = a(g) * c(u) of a gate g and another branch u.

SwiGLU (arXiv 2002.05202) has a = silu and c the identity. SiTU, Kimi K3's (arXiv 2607.24653), bounds both branches:

    a(g) = b tanh(g / b) sigmoid(g),    c(u) = l tanh(u / l)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..config import DecoderShape


class Activation(NamedTuple):
    """beta: b of SiTU, 0 for silu; linear_beta: l of SiTU, 0 for the identity. SiTU is computed in fp32 or wider."""

    beta: float = 0.0
    linear_beta: float = 0.0

    @classmethod
    def from_config(cls, config: DecoderShape) -> Activation:
        if config.hidden_act == "silu":
            return cls()
        return cls(config.activation_situ_beta, config.activation_situ_linear_beta)

    def __call__(self, gate: Tensor, up: Tensor) -> Tensor:
        """h, in the dtype and of the shape of both branches."""
        return self.of_gate(gate) * self.of_up(up)

    def of_gate(self, gate: Tensor) -> Tensor:
        """a(g)."""
        if not self.beta:
            return F.silu(gate)
        wide = _wide(gate)
        return (self.beta * torch.tanh(wide / self.beta) * wide.sigmoid()).to(gate.dtype)

    def of_up(self, up: Tensor) -> Tensor:
        """c(u), which may be u itself."""
        if not self.linear_beta:
            return up
        return (self.linear_beta * torch.tanh(_wide(up) / self.linear_beta)).to(up.dtype)

    def gate_gradient(self, da: Tensor, gate: Tensor) -> Tensor:
        """The gradient of g from that of a(g)."""
        if not self.beta:
            return torch.ops.aten.silu_backward(da, gate)
        tanh, sigmoid = torch.tanh(_wide(gate) / self.beta), _wide(gate).sigmoid()
        slope = sigmoid * (1 - tanh.square() + self.beta * tanh * (1 - sigmoid))
        return (da * slope).to(gate.dtype)

    def up_gradient(self, dc: Tensor, up: Tensor) -> Tensor:
        """The gradient of u from that of c(u)."""
        if not self.linear_beta:
            return dc
        return (dc * (1 - torch.tanh(_wide(up) / self.linear_beta).square())).to(up.dtype)


SILU = Activation()
"""SwiGLU's."""


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
