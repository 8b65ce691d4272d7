"""Causal self-attention with grouped key-value heads and rotary positions, through torch's
scaled_dot_product_attention.

Shape suffixes: B batch, T tokens, S keys, H query heads, K key-value heads, E head width, D model width.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...ops.exporting import is_exporting
from ...version import NAMESPACE
from ..config import DecoderConfig, DecoderShape
from ..layer import Layer, layer_input


class Cache(Protocol):
    """What layers keep of earlier tokens; Hugging Face's caches have this interface too, but for linear states."""

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Appends [B, K, T, E] keys and values of an attention layer; returns all of them, [B, K, S, E]."""
        ...

    def linear_state(self, layer_idx: int) -> Any:
        """The state that a linear attention layer has set, or None before its first token."""
        ...

    def set_linear_state(self, layer_idx: int, state: Any) -> None: ...

    def get_seq_length(self) -> int:
        """Tokens held."""
        ...


MASK_ELEMENTS = 1 << 24
"""Most elements of a mask over earlier and new tokens that `sdpa` makes at a time."""


def sdpa(layer: Any, q_BHTE: Tensor, k_BKSE: Tensor, v_BKSE: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of a layer's finished queries over all keys and values, [B, T, H, E]. layer.head_dim sets the scale.

    Without a mask it is causal, the queries being those of the last T tokens.
    """
    tokens, earlier = q_BHTE.shape[2], k_BKSE.shape[2] - q_BHTE.shape[2]
    if mask is None and earlier and tokens > 1:
        # in slices, since a mask of a long prompt's chunk would be larger than all that depth attention keeps
        rows = max(1, MASK_ELEMENTS // k_BKSE.shape[2])
        slices = []
        for first in range(0, tokens, rows):
            queries = q_BHTE[:, :, first : first + rows]
            keys = earlier + first + queries.shape[2]
            position = torch.arange(keys, device=q_BHTE.device)
            slices.append(
                sdpa(
                    layer,
                    queries,
                    k_BKSE[:, :, :keys],
                    v_BKSE[:, :, :keys],
                    position <= position[earlier + first :, None],
                )
            )
        return torch.cat(slices, 1)
    o_BHTE = F.scaled_dot_product_attention(
        q_BHTE,
        k_BKSE,
        v_BKSE,
        attn_mask=mask,
        is_causal=mask is None and not earlier,
        scale=layer.head_dim**-0.5,
        enable_gqa=q_BHTE.shape[1] != k_BKSE.shape[1],
    )
    return o_BHTE.transpose(1, 2)


@contextmanager
def lengths_vary() -> Iterator[None]:
    """Within it torch's attention leaves cuDNN alone, which builds a plan for every new number of keys: 60 ms for each
    token on an H100, where the token itself takes 47."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


class Context(NamedTuple):
    """What attention layers need to know beside their input.

    cos, sin: [B or 1, T, E] rotary factors; mask: boolean [T, S], True where a query may look, or None for plain causal
    attention; cache: keys and values of earlier tokens, or None; attend: what computes
    attention, with the signature of `sdpa` (another one may want masks of another kind); absorb: whether `attend` takes
    the wide heads of latent attention's absorbed form; present: [B, T, 1], 0 at padding and else 1, for layers without
    masks, or None for no padding; cu_seqlens: int [N + 1], where N sequences that do not see each other begin and end
    if all rows follow one another, for linear attention layers (masks say it to the others), or None;
    normalise: whether the layer gets what stands before its norm; window_mask: a mask of the form of `attend` for
    sliding-window attention, None for one of plain causal attention's.
    """

    cos: Tensor
    sin: Tensor
    mask: Any = None
    cache: Cache | None = None
    attend: Callable[[Any, Tensor, Tensor, Tensor, Any], Tensor] = sdpa
    absorb: bool = True
    present: Tensor | None = None
    cu_seqlens: Tensor | None = None
    normalise: bool = False
    window_mask: Any = None


class Attention(Layer):
    """One attention layer: its input norm and four projections. `layer_idx` counts attention layers, for the cache.

    The attributes are named as the attention functions of Hugging Face read them.
    """

    split = {"q_proj.weight": 0, "k_proj.weight": 0, "v_proj.weight": 0, "o_proj.weight": 1}
    divides = ("num_attention_heads", "num_key_value_heads")
    is_causal = True

    def __init__(self, config: DecoderConfig, layer_idx: int) -> None:
        super().__init__()
        assert config.head_dim is not None and config.num_key_value_heads is not None
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=False)

    def forward(self, x_BTD: Tensor, context: Context) -> Tensor:
        """The layer's output [B, T, D] for its already normalised input [B, T, D]."""
        x_BTD = layer_input(self, x_BTD, context)
        # each call written out, or vLLM finds no three matrices to make one of
        q_BHTE = self._heads(self.q_proj(x_BTD))
        k_BKTE = self._heads(self.k_proj(x_BTD))
        v_BKTE = self._heads(self.v_proj(x_BTD))
        q_BHTE, k_BKTE = rotate(q_BHTE, context), rotate(k_BKTE, context)
        if context.cache is not None:
            k_BKTE, v_BKTE = context.cache.update(k_BKTE, v_BKTE, self.layer_idx)
        return self.o_proj(self.attend(q_BHTE, k_BKTE, v_BKTE, context).flatten(2))

    def _heads(self, x_BTY: Tensor) -> Tensor:
        return x_BTY.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def attend(self, q_BHTE: Tensor, k_BKSE: Tensor, v_BKSE: Tensor, context: Context) -> Tensor:
        """Attention [B, T, H, E] of rotated queries over all keys and values, those of earlier tokens included."""
        return context.attend(self, q_BHTE, k_BKSE, v_BKSE, context.mask)

    def flops(self, context: int) -> float:
        """Beside the matrices 2 for every channel of a key and of a value, over the mean of (context + 1) / 2 keys."""
        return super().flops(context) + 2 * (context + 1) * self.o_proj.in_features

    @classmethod
    def kept(cls, config: DecoderShape) -> str:
        return f"{config.num_key_value_heads} keys and values of width {config.head_dim} a token"

    def keep(self, cache: Cache, rows: int, tokens: int, dtype: torch.dtype) -> None:
        heads = self.k_proj.out_features // self.head_dim
        keys = torch.empty(rows, heads, tokens, self.head_dim, dtype=dtype)
        cache.update(keys, torch.empty_like(keys), self.layer_idx)

    @classmethod
    def paged(cls, config: DecoderShape) -> tuple[int, int, int] | None:
        assert config.num_key_value_heads is not None and config.head_dim is not None
        return config.num_key_value_heads, config.head_dim, config.head_dim


def rotary_factors(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin [..., T, head_dim] in fp32 for positions [..., T]; the two halves of a head rotate together."""
    if torch.compiler.is_compiling() and not is_exporting():  # a program must run without this package
        return _opaque_rotary_factors(positions, head_dim, theta)
    return _rotary_factors(positions, head_dim, theta)


def _rotary_factors(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    frequencies = theta ** -(torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim)
    angles = positions.unsqueeze(-1).float() * frequencies
    angles = torch.cat([angles, angles], -1)
    return angles.cos(), angles.sin()


# a compiler would compute powers, cosines and sines anew for every element of every head of every layer
_opaque_rotary_factors = torch.library.custom_op(f"{NAMESPACE}::rotary_factors", _rotary_factors, mutates_args=())


@_opaque_rotary_factors.register_fake
def _(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    factors = positions.new_empty((*positions.shape, head_dim), dtype=torch.float32)
    return factors, torch.empty_like(factors)


def rotate(heads: Tensor, context: Context) -> Tensor:
    """Applies rotary positions to heads [B, H, T, E]."""
    cos, sin = context.cos.unsqueeze(1).to(heads.dtype), context.sin.unsqueeze(1).to(heads.dtype)
    first, second = heads.chunk(2, -1)
    return heads * cos + torch.cat([-second, first], -1) * sin
