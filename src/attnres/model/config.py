"""The shape of a decoder, as data."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import UsageError, check_counts
from ..residual import registry
from ..residual.base import Residual
from . import layer

MOST, MOST_BLOCKS, MOST_ELEMENTS = 2**31 - 1, 2**16, 2**50
"""Bounds of a size, of the Transformer blocks, and of a matrix: far beyond any model, and within 64-bit arithmetic."""


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
    """Inner width of a dense MLP; the default is 8/3 hidden_size rounded up to a multiple of 64."""
    hidden_act: str = "silu"
    """Activation of all MLPs, experts included: silu, or situ, Kimi K3's (b tanh(g / b) sigmoid(g) in place of silu(g),
    and c tanh(u / c) in place of u)."""
    activation_situ_beta: float = 4.0
    """b of situ: the bound of the gate's branch."""
    activation_situ_linear_beta: float = 25.0
    """c of situ: the bound of the other branch; 0 for none."""
    attention_pattern: tuple[str, ...] = ("gqa",)
    """Kinds of attention layers, repeated over the Transformer blocks and cut at their number: gqa (grouped-query), mla
    (multi-head latent attention without positions), kda (Kimi Delta Attention), sliding_window (grouped-query over the
    last sliding_window tokens). kda kda kda mla is Kimi Linear's."""
    kv_lora_rank: int | None = None
    """Width of the latent that an mla layer caches; the default is 4 head_dim."""
    qk_nope_head_dim: int | None = None
    """Width of a query's and key's own part in an mla layer; the default is head_dim."""
    qk_rope_head_dim: int | None = None
    """Width of the key part that all heads of an mla layer share (and do not rotate); the default is head_dim / 2."""
    v_head_dim: int | None = None
    """Width of a value in an mla layer; the default is head_dim."""
    q_lora_rank: int | None = None
    """Width of a latent that the queries of an mla layer come from; by default they come from its input."""
    mla_use_output_gate: bool = False
    """Multiply what an mla layer attended to by a sigmoid of its input, before the output projection."""
    linear_num_heads: int | None = None
    """Heads of a kda layer; the default is num_attention_heads."""
    linear_head_dim: int | None = None
    """Width of keys and values of a kda layer, and the rank of its gates; the default is head_dim."""
    linear_gate_lower_bound: float | None = None
    """The strongest log-decay of a kda layer, negative (Kimi K3: -5): g = bound sigmoid(exp(A_log) (f + dt_bias)). By
    default there is no bound: g = -exp(A_log) softplus(f + dt_bias)."""
    linear_full_rank_gate: bool = False
    """Make the output gate of a kda layer of one matrix instead of two of rank linear_head_dim."""
    linear_conv_kernel_dim: int = 4
    """Tokens that the short convolutions of a kda layer see."""
    linear_chunk_size: int = 64
    """Tokens that a kda layer handles in parallel in training, a power of two."""
    feed_forward: str = "swiglu"
    """Kind of the MLPs that are no mixture of experts."""
    sliding_window: int | None = None
    """Tokens that a sliding_window layer looks back over, its own included; to be given if there are such layers."""
    num_experts: int = 0
    """Routed experts of an MLP; 0 for dense MLPs."""
    num_experts_per_tok: int = 8
    """Routed experts that a token is sent to."""
    num_shared_experts: int = 1
    """Experts that every token is sent to besides."""
    moe_intermediate_size: int | None = None
    """Inner width of one expert; the default gives a token's experts the width of a dense MLP together, rounded up to a
    multiple of 8."""
    routed_expert_hidden_size: int | None = None
    """Width that routed experts read and write, between two matrices that all of a layer share; the default is
    hidden_size, without such matrices. Shared experts keep hidden_size."""
    latent_moe_use_norm: bool = False
    """Normalise the sum of the routed experts at that width, before the matrix that leads back."""
    first_k_dense_replace: int = 0
    """Transformer blocks at the start whose MLP stays dense although there are experts."""
    routed_scaling_factor: float = 1.0
    """Factor on the sum of the routed experts' outputs."""
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
        if not 0 <= self.initializer_range < float("inf"):
            raise UsageError(f"initializer_range must be zero or positive; it is {self.initializer_range}")
        self._check_activation()
        self._set_attention()
        self._set_experts()
        self._check_elements()
        for layer_kind in dict.fromkeys(self.layer_kinds):
            layer_kind.check(self)

    def _check_activation(self) -> None:
        if self.hidden_act not in ("silu", "situ"):
            raise UsageError(f"hidden_act must be silu or situ; it is {self.hidden_act!r}")
        if not 0 < self.activation_situ_beta < float("inf"):
            raise UsageError(f"activation_situ_beta must be positive; it is {self.activation_situ_beta}")
        if not 0 <= self.activation_situ_linear_beta < float("inf"):
            raise UsageError(
                f"activation_situ_linear_beta must be positive, or 0 for none; it is {self.activation_situ_linear_beta}"
            )

    def _set_attention(self) -> None:
        self.attention_pattern = tuple(self.attention_pattern)  # a list if it comes from a JSON file
        for kind in self.attention_pattern:
            layer.get(kind, "attention_pattern")
        if not self.attention_pattern:
            raise UsageError("attention_pattern is empty; name at least one kind, such as gqa")
        assert self.head_dim is not None
        defaults = {
            "kv_lora_rank": 4 * self.head_dim,
            "qk_nope_head_dim": self.head_dim,
            "qk_rope_head_dim": self.head_dim // 2,
            "v_head_dim": self.head_dim,
            "linear_num_heads": self.num_attention_heads,
            "linear_head_dim": self.head_dim,
        }
        for name, value in defaults.items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        for name in (*defaults, "linear_conv_kernel_dim", "linear_chunk_size"):
            _positive(name, getattr(self, name))
        if self.q_lora_rank is not None:
            _positive("q_lora_rank", self.q_lora_rank)
        bound = self.linear_gate_lower_bound
        if bound is not None and not float("-inf") < bound < 0:
            raise UsageError(f"linear_gate_lower_bound must be negative, such as -5, or None; it is {bound}")
        if self.linear_chunk_size & (self.linear_chunk_size - 1):
            raise UsageError(f"linear_chunk_size must be a power of two, such as 64; it is {self.linear_chunk_size}")

    def _set_experts(self) -> None:
        for name in ("num_experts", "num_shared_experts", "first_k_dense_replace"):
            _positive(name, getattr(self, name), 0)
        _positive("num_experts_per_tok", self.num_experts_per_tok)
        if self.num_experts and self.num_experts_per_tok > self.num_experts:
            raise UsageError(
                f"num_experts_per_tok must be at most num_experts; it is {self.num_experts_per_tok}, and there are "
                f"{self.num_experts}"
            )
        if self.moe_intermediate_size is None:
            assert self.intermediate_size is not None
            activated = self.num_experts_per_tok + self.num_shared_experts
            self.moe_intermediate_size = -(-self.intermediate_size // activated // 8) * 8
        _positive("moe_intermediate_size", self.moe_intermediate_size)
        if self.routed_expert_hidden_size is not None:
            _positive("routed_expert_hidden_size", self.routed_expert_hidden_size)
        elif self.latent_moe_use_norm:
            raise UsageError("latent_moe_use_norm is for experts of another width; give routed_expert_hidden_size")
        if not 0 < self.routed_scaling_factor < float("inf"):
            raise UsageError(f"routed_scaling_factor must be positive; it is {self.routed_scaling_factor}")

    def _check_elements(self) -> None:
        assert self.head_dim and self.intermediate_size and self.moe_intermediate_size and self.linear_head_dim
        heads = max(self.num_attention_heads * self.head_dim, (self.linear_num_heads or 0) * self.linear_head_dim)
        widths = {
            "vocab_size": self.vocab_size,
            "intermediate_size": self.intermediate_size,
            "num_experts x moe_intermediate_size": self.num_experts * self.moe_intermediate_size,
            "the width of all heads": heads,
            "hidden_size": self.hidden_size,
        }
        for name, width in widths.items():
            if width * self.hidden_size > MOST_ELEMENTS:
                raise UsageError(
                    f"{name} x hidden_size must be at most {MOST_ELEMENTS}; it is {width} x {self.hidden_size}"
                )

    @property
    def attention_kinds(self) -> tuple[str, ...]:
        """The kind of attention of every Transformer block."""
        pattern = self.attention_pattern
        return tuple(pattern[block % len(pattern)] for block in range(self.num_hidden_layers))

    def has_experts(self, block: int) -> bool:
        """Whether the MLP of a Transformer block, counted from 0, is a mixture of experts."""
        return self.num_experts > 0 and block >= self.first_k_dense_replace

    @property
    def layer_kinds(self) -> tuple[type[layer.Layer], ...]:
        """The class of every layer, attention and MLP in turn."""
        attention = [layer.get(kind, "attention_pattern") for kind in self.attention_pattern]
        dense, experts = (layer.get(kind, "feed_forward", False) for kind in (self.feed_forward, "experts"))
        return tuple(
            kind
            for block in range(self.num_hidden_layers)
            for kind in (attention[block % len(attention)], experts if self.has_experts(block) else dense)
        )

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
        registry.get(self.residual)

    def build_residual(self) -> Residual:
        """The residual connection of this config."""
        defaults = registry.get(self.residual).decoder_options
        return registry.build(self.residual, self.hidden_size, self.num_layers, **{**defaults, **self.residual_options})

    def check_residual(self) -> None:
        """Raises UsageError for options that the residual connection refuses; takes no memory."""
        with torch.device("meta"):
            self.build_residual()

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
        from .counting import parameter_counts

        return parameter_counts(self)

    def flops_per_token(self, context: int) -> float:
        """Floating-point operations of training on one token, forward and backward, in a context of that many."""
        from .counting import training_flops_per_token

        return training_flops_per_token(self, context)


def _positive(name: str, value: Any, least: int = 1) -> None:
    check_counts(least, **{name: value})
    most = MOST_BLOCKS if name == "num_hidden_layers" else MOST
    if value > most:
        raise UsageError(f"{name} must be at most {most}; it is {value}")
