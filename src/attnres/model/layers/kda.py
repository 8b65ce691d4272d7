"""Kimi Delta Attention: linear attention whose state forgets by channel and corrects what it holds (arXiv 2510.26692).

    q, k = L2norm(silu(conv(W_q x))), L2norm(silu(conv(W_k x))),  v = silu(conv(W_v x)),  beta = sigmoid(W_b x)
    g = -exp(A_log) softplus(W_f2 W_f1 x + dt_bias)                     log-decay of each channel of a key
    y = W_o [sigmoid(W_g2 W_g1 x) * RMSNorm(delta_rule(q, k, v, g, beta))]

Kimi K3 (arXiv 2607.24653) bounds the decay, g = bound sigmoid(exp(A_log) (W_f2 W_f1 x + dt_bias)), and has one matrix
in the place of W_g2 W_g1.

The convolutions are depthwise and causal. See `delta_rule` for the recurrence and its chunked form. Shape suffixes: B
batch, T tokens, H heads, E head width, D model width, W convolution width, N = H E.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import UsageError, check_counts
from ...residual.base import normed
from ..config import DecoderShape
from ..layer import Layer, layer_input
from .delta_rule import check_chunk_size, delta_rule
from .gqa import Cache, Context


class KDAState(NamedTuple):
    """What a layer keeps of earlier tokens: conv [B, 3 N, W - 1], the last inputs of the convolutions of q, k and v,
    oldest first; memory [B, H, E, E], keys by values, in fp32 or wider."""

    conv: Tensor
    memory: Tensor


class KimiDeltaAttention(Layer):
    """One Kimi Delta Attention layer, with its input norm. Parameters are named as in Kimi Linear's published model.

    Args:
        hidden_size: width D.
        num_heads: H; head_dim: E of keys and values, and the rank of both gates.
        conv_size: W, tokens that the short convolutions see.
        layer_idx: counts attention layers of all kinds, for the cache.
        norm_eps: of the input norm and of the heads' output norm.
        chunk_size: C, tokens that are handled in parallel, a power of two.
        gate_lower_bound: the strongest log-decay, negative; None for none.
        full_rank_gate: whether the output gate is one matrix, g_proj, instead of g_a_proj and g_b_proj.

    Raises UsageError for a size that cannot be.
    """

    word = "KDA"
    split = {
        **{f"{name}.weight": 0 for name in ("q_proj", "k_proj", "v_proj", "f_b_proj", "g_b_proj", "b_proj")},
        **{f"{name}_conv1d": 0 for name in ("q", "k", "v")},
        "A_log": 0,
        "dt_bias": 0,
        "o_proj.weight": 1,
    }
    divides = ("linear_num_heads",)
    cache_type = "linear_attention"

    def __init__(
        self,
        *,
        hidden_size: int,
        num_heads: int,
        head_dim: int,
        conv_size: int = 4,
        layer_idx: int = 0,
        norm_eps: float = 1e-5,
        chunk_size: int = 64,
        gate_lower_bound: float | None = None,
        full_rank_gate: bool = False,
    ) -> None:
        super().__init__()
        check_counts(hidden_size=hidden_size, num_heads=num_heads, head_dim=head_dim, conv_size=conv_size)
        check_chunk_size(chunk_size)
        width = num_heads * head_dim
        self.num_heads, self.head_dim, self.conv_size = num_heads, head_dim, conv_size
        self.layer_idx, self.chunk_size, self.gate_lower_bound = layer_idx, chunk_size, gate_lower_bound
        self.norm = nn.RMSNorm(hidden_size, norm_eps)
        self.q_proj = nn.Linear(hidden_size, width, bias=False)
        self.k_proj = nn.Linear(hidden_size, width, bias=False)
        self.v_proj = nn.Linear(hidden_size, width, bias=False)
        self.q_conv1d = nn.Parameter(torch.empty(width, conv_size))
        self.k_conv1d = nn.Parameter(torch.empty(width, conv_size))
        self.v_conv1d = nn.Parameter(torch.empty(width, conv_size))
        self.f_a_proj = nn.Linear(hidden_size, head_dim, bias=False)
        self.f_b_proj = nn.Linear(head_dim, width, bias=False)
        self.A_log = nn.Parameter(torch.empty(num_heads))
        self.dt_bias = nn.Parameter(torch.empty(width))
        self.b_proj = nn.Linear(hidden_size, num_heads, bias=False)
        self.g_proj: nn.Linear | None = None
        if full_rank_gate:
            self.g_proj = nn.Linear(hidden_size, width, bias=False)
            self.split = {path.replace("g_b_proj", "g_proj"): dim for path, dim in type(self).split.items()}
        else:
            self.g_a_proj = nn.Linear(hidden_size, head_dim, bias=False)
            self.g_b_proj = nn.Linear(head_dim, width, bias=False)
        self.o_norm = nn.RMSNorm(head_dim, norm_eps)
        self.o_proj = nn.Linear(width, hidden_size, bias=False)
        self.reset_parameters()

    @classmethod
    def from_config(cls, config: DecoderShape, block: int) -> KimiDeltaAttention:
        assert config.linear_num_heads is not None and config.linear_head_dim is not None
        return cls(
            hidden_size=config.hidden_size,
            num_heads=config.linear_num_heads,
            head_dim=config.linear_head_dim,
            conv_size=config.linear_conv_kernel_dim,
            layer_idx=block,
            norm_eps=config.rms_norm_eps,
            chunk_size=config.linear_chunk_size,
            gate_lower_bound=config.linear_gate_lower_bound,
            full_rank_gate=config.linear_full_rank_gate,
        )

    def forward(self, x_BTD: Tensor, context: Context) -> Tensor:
        """The layer's output [B, T, D] for its already normalised input [B, T, D].

        With context.cache it goes on from the state that the cache holds for this layer and leaves the new one there.
        With context.cu_seqlens, int [N + 1], the rows, one after the other, hold N sequences that do not see each
        other, and a state has N rows. Raises UsageError if the cache's state is that of another layer.
        """
        x_BTD = layer_input(self, x_BTD, context)
        cu_seqlens = getattr(context, "cu_seqlens", None)
        present = getattr(context, "present", None)
        if present is not None:
            x_BTD = x_BTD * present  # then padding in front leaves the state at zero
        shape = x_BTD.shape
        if cu_seqlens is not None:
            x_BTD = x_BTD.flatten(0, 1).unsqueeze(0)
        earlier = None if context.cache is None else context.cache.linear_state(self.layer_idx)
        mixed_BT3N = torch.cat([self.q_proj(x_BTD), self.k_proj(x_BTD), self.v_proj(x_BTD)], -1)
        if earlier is not None:
            rows = x_BTD.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
            self._check_state(earlier, rows, mixed_BT3N.shape[-1])
        q_BTHE, k_BTHE, v_BTHE, conv = self._convolved(mixed_BT3N, earlier, cu_seqlens)
        wide = torch.promote_types(x_BTD.dtype, torch.float32)
        o_BTHE, memory = delta_rule(
            _unit(q_BTHE.to(wide)),
            _unit(k_BTHE.to(wide)),
            v_BTHE,
            self._log_decay(x_BTD),
            self.b_proj(x_BTD).to(wide).sigmoid(),
            None if earlier is None else earlier.memory,
            cu_seqlens,
            self.chunk_size,
        )
        if context.cache is not None:
            context.cache.set_linear_state(self.layer_idx, KDAState(conv, memory))
        gate_BTN = self.g_b_proj(self.g_a_proj(x_BTD)) if self.g_proj is None else self.g_proj(x_BTD)
        gate_BTHE = self._heads(gate_BTN).sigmoid()
        return self.o_proj((normed(o_BTHE, self.o_norm) * gate_BTHE).flatten(2)).view(shape)

    def _log_decay(self, x_BTD: Tensor) -> Tensor:
        """g [B, T, H, E], fp32 or wider."""
        wide = torch.promote_types(x_BTD.dtype, torch.float32)
        A_H1, dt_HE = self.A_log.to(wide).exp()[:, None], self.dt_bias.to(wide).unflatten(0, (-1, self.head_dim))
        rate_BTHE = self._heads(self.f_b_proj(self.f_a_proj(x_BTD))).to(wide) + dt_HE
        if self.gate_lower_bound is not None:
            return self.gate_lower_bound * (A_H1 * rate_BTHE).sigmoid()
        # softplus; the gradient of torch's own has strides that a compiler does not expect
        return -A_H1 * torch.logaddexp(rate_BTHE, torch.zeros_like(rate_BTHE))

    def _convolved(
        self, mixed_BT3N: Tensor, earlier: KDAState | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries, keys and values [B, T, H, E], and the inputs that the next tokens' convolutions will see."""
        mixed, past = mixed_BT3N.mT, self.conv_size - 1
        sequences = [mixed]
        if cu_seqlens is not None:
            sequences = [mixed[..., start:end] for start, end in pairwise(cu_seqlens.tolist())]
        before = [None] * len(sequences) if earlier is None else earlier.conv.tensor_split(len(sequences))
        seen = [
            F.pad(now, (past, 0)) if old is None else torch.cat([old.to(now.dtype), now], -1)
            for old, now in zip(before, sequences, strict=True)
        ]
        weight = torch.cat([self.q_conv1d, self.k_conv1d, self.v_conv1d]).unsqueeze(1).to(mixed.dtype)
        convolved = [F.conv1d(inputs, weight, groups=len(weight)) for inputs in seen if inputs.shape[-1] > past]
        q, k, v = (self._heads(part) for part in F.silu(torch.cat(convolved, -1)).mT.chunk(3, -1))
        return q, k, v, torch.cat([inputs[..., inputs.shape[-1] - past :] for inputs in seen])

    def _heads(self, x: Tensor) -> Tensor:
        # not to num_heads: under tensor parallelism a process has its share of them
        return x.unflatten(-1, (-1, self.head_dim))

    def _check_state(self, state: Any, rows: int, channels: int) -> None:
        heads = channels // 3 // self.head_dim
        conv, memory = (rows, channels, self.conv_size - 1), (rows, heads, self.head_dim, self.head_dim)
        if not isinstance(state, KDAState):
            found = f"a {type(state).__name__}"
        elif state.conv.shape != conv or state.memory.shape != memory:
            found = f"{list(state.conv.shape)} and {list(state.memory.shape)}"
        else:
            return
        raise UsageError(
            f"the cache is not of this model and batch: layer {self.layer_idx} needs a KDAState of {list(conv)} and "
            f"{list(memory)}, and the cache has {found}; start a new cache"
        )

    def initial_values(
        self, std: Callable[[str], float], generator: torch.Generator | None, device: torch.device
    ) -> Iterator[tuple[str, Tensor]]:
        """Name and initial value of every parameter that is no module's, one after the other: convolutions uniform as
        torch has them, exp(A_log) uniform in 1 .. 16, or 1 under a bound, and dt_bias such that its softplus is
        log-uniform in 0.001 .. 0.1 (flash-linear-attention's). `std` is for layers with matrices of their own."""

        def uniform(name: str, low: float, high: float) -> Tensor:
            like = getattr(self, name)
            return torch.empty(like.shape, dtype=like.dtype, device=device).uniform_(low, high, generator=generator)

        bound = self.conv_size**-0.5
        for name in ("q_conv1d", "k_conv1d", "v_conv1d"):
            yield name, uniform(name, -bound, bound)
        A_H = uniform("A_log", 1, 16)
        yield "A_log", A_H.log() if self.gate_lower_bound is None else torch.zeros_like(A_H)
        step = 10 ** uniform("dt_bias", -3, -1)
        yield "dt_bias", step + torch.log(-torch.expm1(-step))

    def flops(self, context: int) -> float:
        """Beside the matrices, per head of width E in chunks of C: three products with the E x E state (6 E^2), and
        within a chunk two with keys for the scores and three to apply them, over the mean of (C + 1) / 2 tokens
        (5 (C + 1) E); and 2 for every weight of the short convolutions."""
        width = self.o_proj.in_features
        products = width * (6 * self.head_dim + 5 * (self.chunk_size + 1))
        return super().flops(context) + products + 2 * 3 * width * self.conv_size

    @classmethod
    def kept(cls, config: DecoderShape) -> str:
        return (
            f"{config.linear_num_heads} linear attention states of {config.linear_head_dim} x "
            f"{config.linear_head_dim} with a convolution over {config.linear_conv_kernel_dim} tokens"
        )

    def keep(self, cache: Cache, rows: int, tokens: int, dtype: torch.dtype) -> None:
        width, size = self.o_proj.in_features, self.head_dim
        conv = torch.empty(rows, 3 * width, self.conv_size - 1, dtype=dtype)
        memory = torch.empty(rows, width // size, size, size, dtype=torch.float32)
        cache.set_linear_state(self.layer_idx, KDAState(conv, memory))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws what `initial_values` names from torch's global generator."""
        if self.A_log.is_meta:
            return
        for name, value in self.initial_values(lambda role: 0.0, None, self.A_log.device):
            getattr(self, name).copy_(value)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, head_dim={self.head_dim}, chunk_size={self.chunk_size}"


def _unit(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)
