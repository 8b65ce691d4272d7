"""The SwiGLU MLP."""

from torch import Tensor, nn
from torch.nn import functional as F

from ..config import DecoderConfig
from ..layer import Layer, layer_input
from .gqa import Context


class SwiGLU(nn.Module):
    """W_down(silu(W_gate x) * W_up x); with a norm that whoever calls it applies."""

    def __init__(self, hidden_size: int, intermediate_size: int, norm: nn.Module | None = None) -> None:
        super().__init__()
        if norm is not None:
            self.norm = norm
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class FeedForward(SwiGLU, Layer):
    """One MLP layer: its input norm and a SwiGLU."""

    word = "MLP"
    is_attention = False
    split = {"gate_proj.weight": 0, "up_proj.weight": 0, "down_proj.weight": 1}
    divides = ("intermediate_size",)

    def __init__(self, config: DecoderConfig, block: int) -> None:
        assert config.intermediate_size is not None
        norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        super().__init__(config.hidden_size, config.intermediate_size, norm)

    def forward(self, x_BTD: Tensor, context: Context) -> Tensor:  # type: ignore[override]
        """The layer's output [B, T, D] for its already normalised input [B, T, D]."""
        x_BTD = layer_input(self, x_BTD, context)
        return self.down_proj(F.silu(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))  # here too, as vLLM reads the source
