"""The gated MLP."""

from torch import Tensor, nn

from ..config import DecoderConfig
from ..layer import Layer, layer_input
from .activation import SILU, Activation
from .gqa import Context


class GatedMLP(nn.Module):
    """W_down(a(W_gate x) * c(W_up x)), with a and c of the activation; with a norm that whoever calls it applies."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        norm: nn.Module | None = None,
        activation: Activation = SILU,
    ) -> None:
        super().__init__()
        self.activation = activation
        if norm is not None:
            self.norm = norm
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.gate_proj(x), self.up_proj(x)))


class FeedForward(GatedMLP, Layer):
    """One MLP layer: its input norm and a gated MLP."""

    word = "MLP"
    is_attention = False
    split = {"gate_proj.weight": 0, "up_proj.weight": 0, "down_proj.weight": 1}
    divides = ("intermediate_size",)

    def __init__(self, config: DecoderConfig, block: int) -> None:
        assert config.intermediate_size is not None
        norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        super().__init__(config.hidden_size, config.intermediate_size, norm, Activation.from_config(config))

    def forward(self, x_BTD: Tensor, context: Context) -> Tensor:  # type: ignore[override]
        """The layer's output [B, T, D] for its already normalised input [B, T, D]."""
        x_BTD = layer_input(self, x_BTD, context)
        # the same once more, because vLLM reads the source to find matrices that it can make one of
        return self.down_proj(self.activation(self.gate_proj(x_BTD), self.up_proj(x_BTD)))
