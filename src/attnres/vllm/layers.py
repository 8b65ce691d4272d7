"""Attention and MLP of vLLM's parallel layers, between a read and a write. Parameters are named as in a checkpoint,
but for those that vLLM computes as one matrix: q_proj, k_proj and v_proj, gate_proj and up_proj.

Shape suffixes: T tokens of all requests together, D model width.
"""

from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.attention import Attention as CachedAttention
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.rotary_embedding import get_rope

from ..hf import AttnResConfig
from ..model.layers.activation import SILU, Activation
from ..model.layers.sliding_window import SlidingWindowAttention


class Attention(nn.Module):
    """One attention layer, with rotary positions; with a window if the config says so for this layer."""

    def __init__(self, config: AttnResConfig, layer: int, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        assert config.head_dim is not None and config.num_key_value_heads is not None
        processes = get_tensor_model_parallel_world_size()
        heads = config.num_attention_heads // processes
        key_heads = max(1, config.num_key_value_heads // processes)
        self.widths = [heads * config.head_dim, key_heads * config.head_dim, key_heads * config.head_dim]
        quant_config = vllm_config.quant_config
        windowed = config.layer_kinds[layer] is SlidingWindowAttention
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size,
            config.head_dim,
            config.num_attention_heads,
            config.num_key_value_heads,
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.qkv_proj",
        )
        self.o_proj = RowParallelLinear(
            config.num_attention_heads * config.head_dim,
            config.hidden_size,
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.o_proj",
        )
        self.rotary_emb = get_rope(
            config.head_dim,
            config.max_position_embeddings,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        )
        self.attn = CachedAttention(
            heads,
            config.head_dim,
            config.head_dim**-0.5,
            num_kv_heads=key_heads,
            cache_config=vllm_config.cache_config,
            quant_config=quant_config,
            per_layer_sliding_window=config.sliding_window if windowed else None,
            prefix=f"{prefix}.attn",
        )

    def forward(self, x_TD: Tensor, positions: Tensor) -> Tensor:
        """The layer's output [T, D] for its already normalised input [T, D]; positions: int [T]."""
        q, k, v = self.qkv_proj(x_TD)[0].split(self.widths, -1)
        q, k = self.rotary_emb(positions, q, k)
        return self.o_proj(self.attn(q, k, v))[0]


class FeedForward(nn.Module):
    """One MLP layer."""

    def __init__(self, config: AttnResConfig, layer: int, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        assert config.intermediate_size is not None
        quant_config = vllm_config.quant_config
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gate_up_proj = MergedColumnParallelLinear(
            config.hidden_size,
            [config.intermediate_size] * 2,
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.gate_up_proj",
        )
        self.down_proj = RowParallelLinear(
            config.intermediate_size,
            config.hidden_size,
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.down_proj",
        )
        self.activation = Activation.from_config(config)
        self.silu = SiluAndMul() if self.activation == SILU else None

    def forward(self, x_TD: Tensor, positions: Tensor) -> Tensor:
        """The layer's output [T, D] for its already normalised input [T, D]."""
        gate_up = self.gate_up_proj(x_TD)[0]
        h = self.activation(*gate_up.chunk(2, -1)) if self.silu is None else self.silu(gate_up)
        return self.down_proj(h)[0]
