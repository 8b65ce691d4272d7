"""Multi-head latent attention without positional encoding, which caches one latent a token instead of keys and values
(MLA: DeepSeek-V2, arXiv 2405.04434, section 2.1; without positions: Kimi Linear, arXiv 2510.26692).

    c = RMSNorm(W_c x), p = W_p x                       the latent, R numbers, and a key part that all heads share, P
    k_h = [W_k,h c; p], v_h = W_v,h c                   N + P and V numbers
    y = W_o [softmax(q_h k_h^T / sqrt(N + P)) v_h]_h

Queries are q = W_q x, or from a latent of their own, q = W_q RMSNorm(W_a x). Kimi K3 (arXiv 2607.24653) has an output
gate: sigmoid(W_g x) times what W_o is applied to.

The cache holds c and p: R + P numbers a token, whatever the number of heads (512 + 64 in the 48B model). In front of it
there are two forms of one function. Expanded: make k and v of all tokens and attend with H heads. Absorbed: since
q_h . W_k,h c = (W_k,h^T q_h) . c, attend with the latents themselves as the one key and value of all heads, and apply
W_v after. The second spares the expansion of every cached token and costs more per pair of tokens, so it is for the few
new tokens of decoding. Where an adapter or a quantiser has taken the place of W_k and W_v, only the first is there.

Shape suffixes as in `attention`, and R latent width, P shared key width, N width of a head's own key, V value width.
"""

import torch
from torch import Tensor, nn

from ...ops.exporting import is_exporting
from ...residual.base import normed
from ..config import DecoderConfig, DecoderShape
from ..layer import Layer, layer_input
from .gqa import Cache, Context
from .linear import bare_weight


class MultiHeadLatentAttention(Layer):
    """One latent attention layer: its input norm, the projections, and the norm of the latent.

    `layer_idx` counts attention layers of all kinds, for the cache. Modules are named as in DeepSeek's and Kimi's
    published models; `head_dim`, the width of a query, and `num_key_value_groups` as Hugging Face's attention functions
    read them.
    """

    word = "MLA"
    split = {"q_proj.weight": 0, "kv_b_proj.weight": 0, "o_proj.weight": 1}
    roles = {**Layer.roles, "q_a_proj": "query_key", "q_b_proj": "query_key"}
    divides = ("num_attention_heads",)
    is_causal = True
    num_key_value_groups = 1

    def __init__(self, config: DecoderConfig, layer_idx: int) -> None:
        super().__init__()
        assert config.kv_lora_rank is not None and config.v_head_dim is not None
        assert config.qk_nope_head_dim is not None and config.qk_rope_head_dim is not None
        self.config = config
        self.layer_idx = layer_idx
        self.rank, self.shared, self.value = config.kv_lora_rank, config.qk_rope_head_dim, config.v_head_dim
        self.own = config.qk_nope_head_dim
        self.head_dim = self.own + self.shared
        heads, width = config.num_attention_heads, config.hidden_size
        self.norm = nn.RMSNorm(width, config.rms_norm_eps)
        self.split = dict(type(self).split)
        self.q_a_proj: nn.Linear | None = None
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(width, heads * self.head_dim, bias=False)
        else:
            self.q_a_proj = nn.Linear(width, config.q_lora_rank, bias=False)
            self.q_a_layernorm = nn.RMSNorm(config.q_lora_rank, config.rms_norm_eps)
            self.q_b_proj = nn.Linear(config.q_lora_rank, heads * self.head_dim, bias=False)
            self.split["q_b_proj.weight"] = self.split.pop("q_proj.weight")
        self.g_proj: nn.Linear | None = None
        if config.mla_use_output_gate:
            self.g_proj = nn.Linear(width, heads * self.value, bias=False)
            self.split["g_proj.weight"] = 0
        self.kv_a_proj_with_mqa = nn.Linear(width, self.rank + self.shared, bias=False)
        self.kv_a_layernorm = nn.RMSNorm(self.rank, config.rms_norm_eps)
        self.kv_b_proj = nn.Linear(self.rank, heads * (self.own + self.value), bias=False)
        self.o_proj = nn.Linear(heads * self.value, width, bias=False)

    def forward(self, x_BTD: Tensor, context: Context) -> Tensor:
        """The layer's output [B, T, D] for its already normalised input [B, T, D]."""
        x_BTD = layer_input(self, x_BTD, context)
        q_BHTE = self._queries(x_BTD).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        c_BTR, p_BTP = self.kv_a_proj_with_mqa(x_BTD).split([self.rank, self.shared], -1)
        c_B1SR, p_B1SP = normed(c_BTR, self.kv_a_layernorm).unsqueeze(1), p_BTP.unsqueeze(1)
        if context.cache is not None:
            c_B1SR, p_B1SP = context.cache.update(c_B1SR, p_B1SP, self.layer_idx)
        # none with an adapter, which wants a call, nor in an exported program, which cannot choose by the tokens
        absorb = context.absorb and not is_exporting()
        w_YR = bare_weight(self.kv_b_proj) if absorb else None
        if w_YR is not None and self.absorbs(x_BTD.shape[1], c_B1SR.shape[2]):
            o_BTHV = self.absorbed(q_BHTE, c_B1SR, p_B1SP, w_YR, context)
        else:
            o_BTHV = self.expanded(q_BHTE, c_B1SR, p_B1SP, context)
        o_BTY = o_BTHV.flatten(2)
        if self.g_proj is not None:
            o_BTY = o_BTY * self.g_proj(x_BTD).sigmoid()
        return self.o_proj(o_BTY)

    def _queries(self, x_BTD: Tensor) -> Tensor:
        if self.q_a_proj is None:
            return self.q_proj(x_BTD)
        return self.q_b_proj(normed(self.q_a_proj(x_BTD), self.q_a_layernorm))

    def flops(self, context: int) -> float:
        """Beside the matrices, in the expanded form, 2 for every channel of a key and of a value, over the mean of
        (context + 1) / 2 keys."""
        queries = self.q_proj if self.q_a_proj is None else self.q_b_proj
        return super().flops(context) + (context + 1) * (queries.out_features + self.o_proj.in_features)

    @classmethod
    def kept(cls, config: DecoderShape) -> str:
        return f"a latent of {config.kv_lora_rank} + {config.qk_rope_head_dim} numbers a token"

    def keep(self, cache: Cache, rows: int, tokens: int, dtype: torch.dtype) -> None:
        latents, keys = (torch.empty(rows, 1, tokens, width, dtype=dtype) for width in (self.rank, self.shared))
        cache.update(latents, keys, self.layer_idx)

    @classmethod
    def paged(cls, config: DecoderShape) -> tuple[int, int, int] | None:
        assert config.qk_nope_head_dim is not None and config.qk_rope_head_dim is not None
        assert config.v_head_dim is not None
        return config.num_attention_heads, config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim

    def absorbs(self, new: int, tokens: int) -> bool:
        """Whether the absorbed form takes fewer operations for `new` queries over `tokens` keys."""
        expansion = self.rank * (self.own + self.value)  # per key and head, or per query and head if absorbed
        dearer = 2 * self.rank - self.own - self.value  # per pair and head
        return new * expansion + new * tokens * dearer < tokens * expansion

    def expanded(self, q_BHTE: Tensor, c_B1SR: Tensor, p_B1SP: Tensor, context: Context) -> Tensor:
        """Attention [B, T, H, V] of queries over tokens with these latents and shared keys."""
        kv_BHSX = self.kv_b_proj(c_B1SR.squeeze(1)).unflatten(-1, (-1, self.own + self.value)).transpose(1, 2)
        k_BHSN, v_BHSV = kv_BHSX.split([self.own, self.value], -1)
        k_BHSE = torch.cat([k_BHSN, p_B1SP.expand(*k_BHSN.shape[:-1], -1)], -1)
        return context.attend(self, q_BHTE, k_BHSE, v_BHSV, context.mask)

    def absorbed(self, q_BHTE: Tensor, c_B1SR: Tensor, p_B1SP: Tensor, w_YR: Tensor, context: Context) -> Tensor:
        """What `expanded` returns, with the expansion w_YR applied to queries and outputs instead of keys and values.

        w_YR: the matrix of kv_b_proj, Y = H (N + V).
        """
        w_HXR = w_YR.unflatten(0, (-1, self.own + self.value))
        k_HNR, v_HVR = w_HXR.split([self.own, self.value], 1)
        q_BHTN, q_BHTP = q_BHTE.split([self.own, self.shared], -1)
        q_BHTX = torch.cat([q_BHTN @ k_HNR, q_BHTP], -1)
        heads = (-1, q_BHTE.shape[1], -1, -1)
        k_BHSX, v_BHSR = torch.cat([c_B1SR, p_B1SP], -1).expand(heads), c_B1SR.expand(heads)
        o_BTHR = context.attend(self, q_BHTX, k_BHSX, v_BHSR, context.mask)
        return torch.einsum("bthr,hvr->bthv", o_BTHR, v_HVR)
