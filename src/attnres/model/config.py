"""The shape of a decoder, as data, and the named shapes."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from .. import residual as residuals
from ..errors import UsageError


@dataclass
class DecoderShape:
    """Everything about a decoder but its residual connection. Names are Hugging Face's where it has them."""

    vocab_size: int = 257
    """Size of the vocabulary, in tokens; 257 is bytes and an end-of-document token. Training raises it to the
    tokenizer's if that is larger."""
    hidden_size: int = 128
    """Width D of the residual stream."""
    num_hidden_layers: int = 12
    """Transformer blocks; each has two layers in the sense of the paper, one attention and one MLP."""
    num_attention_heads: int = 4
    """Query heads of an attention layer."""
    num_key_value_heads: int | None = None
    """Key and value heads (grouped-query attention); the default is num_attention_heads."""
    head_dim: int | None = None
    """Width of one head, even; the default is hidden_size / num_attention_heads."""
    intermediate_size: int | None = None
    """Inner width of the SwiGLU MLP; the default is 8/3 hidden_size rounded up to a multiple of 64."""
    max_position_embeddings: int = 2048
    """Longest context the model is meant for, in tokens."""
    rope_theta: float = 10000.0
    """Base of the rotary position embedding."""
    rms_norm_eps: float = 1e-6
    """eps of every layer's input norm and of the final norm."""
    tie_word_embeddings: bool = True
    """Use the embedding matrix as output head."""
    initializer_range: float = 0.02
    """Standard deviation of the initial weights; about 0.7 / sqrt(hidden_size) for small widths."""

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "max_position_embeddings",
        ):
            _positive(name, getattr(self, name))
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise UsageError(
                    f"num_attention_heads must divide hidden_size, or head_dim be given; "
                    f"{self.num_attention_heads} does not divide {self.hidden_size}"
                )
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.intermediate_size is None:
            self.intermediate_size = -(-8 * self.hidden_size // 3 // 64) * 64
        for name in ("num_key_value_heads", "head_dim", "intermediate_size"):
            _positive(name, getattr(self, name))
        if self.num_attention_heads % self.num_key_value_heads:
            raise UsageError(
                f"num_key_value_heads must divide num_attention_heads; "
                f"{self.num_key_value_heads} does not divide {self.num_attention_heads}"
            )
        if self.head_dim % 2:
            raise UsageError(f"head_dim must be even for rotary embeddings; it is {self.head_dim}")
        if not self.rms_norm_eps >= 0:
            raise UsageError(f"rms_norm_eps must be zero or positive; it is {self.rms_norm_eps}")

    @property
    def num_layers(self) -> int:
        """L as the paper counts: every attention and every MLP is one layer."""
        return 2 * self.num_hidden_layers


@dataclass
class DecoderConfig(DecoderShape):
    """A decoder-only language model with its residual connection."""

    residual: str = "block_attnres"
    """Residual connection, by its registered name."""
    residual_options: dict[str, Any] = field(default_factory=dict)
    """Options of the residual connection, such as num_blocks or block_size; these count layers, not Transformer
    blocks."""

    def __post_init__(self) -> None:
        super().__post_init__()
        residuals.get(self.residual)

    def build_residual(self) -> residuals.Residual:
        """The residual connection of this config."""
        defaults = residuals.get(self.residual).decoder_options
        return residuals.build(
            self.residual, self.hidden_size, self.num_layers, **{**defaults, **self.residual_options}
        )

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "DecoderConfig":
        """The config of `to_dict`'s result. Raises UsageError for a key that is not a field."""
        known = {f.name for f in dataclasses.fields(cls)}
        for name in values:
            if name not in known:
                raise UsageError(f"model config has no field {name!r}; it has {', '.join(sorted(known))}")
        return cls(**values)

    def parameter_counts(self) -> dict[str, int]:
        """Exact: "total"; "activated" per token, without embeddings and head; "embedding", with an untied head."""
        from .accounting import parameter_counts

        return parameter_counts(self)

    def flops_per_token(self, context: int) -> float:
        """Floating-point operations of training on one token, forward and backward, in a context of that many."""
        from .accounting import training_flops_per_token

        return training_flops_per_token(self, context)


_PRESETS: dict[str, dict[str, Any]] = {
    # the default of `attnres compare`: minutes on two CPU cores
    "tiny": {
        "hidden_size": 128,
        "num_hidden_layers": 12,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "initializer_range": 0.06,
    },
    "small": {
        "hidden_size": 512,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "initializer_range": 0.03,
    },
    "medium": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "num_key_value_heads": 4},
}


def presets() -> list[str]:
    """The names that `preset` knows."""
    return list(_PRESETS)


def preset(name: str) -> DecoderConfig:
    """A named shape. Raises UsageError for an unknown name."""
    if name not in _PRESETS:
        raise UsageError(f"preset {name!r} is unknown; known: {', '.join(_PRESETS)}")
    return DecoderConfig(**_PRESETS[name])


def _positive(name: str, value: Any) -> None:
    if not isinstance(value, int) or value < 1:
        raise UsageError(f"{name} must be a positive whole number; it is {value!r}")
