"""The SwiGLU MLP."""

from torch import Tensor, nn
from torch.nn import functional as F

from ..config import DecoderConfig
from .gqa import Context, layer_input


class FeedForward(nn.Module):
    """One MLP layer: its input norm and W_down(silu(W_gate x) * W_up x)."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        assert config.intermediate_size is not None
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x_BTD: Tensor, context: Context) -> Tensor:
        """The layer's output [B, T, D] for its already normalised input [B, T, D]."""
        x_BTD = layer_input(self, x_BTD, context)
        return self.down_proj(F.silu(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))
