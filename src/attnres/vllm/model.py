"""The language model that vLLM runs for `AttnResForCausalLM`: its layers in this library's loop.

Between layers there is a residual state, a NamedTuple of tensors [T, D] over the tokens of all requests of a step.
Reads go to the backend that `ops.dispatch` chooses. The norms are torch's, because reads fold those into their kernels.
Nothing depends on values or waits for the device, so a pass can be captured. Every process of a tensor-parallel group
reads whole hidden states.
"""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.interfaces import SupportsQuant
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper, maybe_prefix

from ..model.loop import input_norm, run
from .layers import Attention, FeedForward

STACKED = {
    ".q_proj": (".qkv_proj", "q"),
    ".k_proj": (".qkv_proj", "k"),
    ".v_proj": (".qkv_proj", "v"),
    ".gate_proj": (".gate_up_proj", 0),
    ".up_proj": (".gate_up_proj", 1),
}
"""Matrices of a checkpoint that are parts of one of vLLM's."""


@support_torch_compile(dynamic_arg_dims={"input_ids": 0, "positions": 0, "inputs_embeds": 0})
class AttnResModel(nn.Module):
    """The decoder without its head."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.embed_tokens = VocabParallelEmbedding(
            config.vocab_size,
            config.hidden_size,
            quant_config=vllm_config.quant_config,
            prefix=maybe_prefix(prefix, "embed_tokens"),
        )
        self.residual = config.build_residual()
        self.layers = nn.ModuleList(
            (Attention if kind.is_attention else FeedForward)(
                config, layer, vllm_config, maybe_prefix(prefix, f"layers.{layer}")
            )
            for layer, kind in enumerate(config.layer_kinds)
        )
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not self.residual.pre_norm:
            for module in (self, *self.layers):
                module.norm = nn.Identity()

    def forward(self, input_ids: Tensor | None, positions: Tensor, inputs_embeds: Tensor | None = None) -> Tensor:
        """The final norm's output [T, D] for token ids [T] or their embeddings [T, D]; positions: int [T]."""
        embedding = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        state = run(
            self.residual,
            self.layers,
            self.residual.start(embedding),
            0,
            len(self.layers),
            call=lambda layer, x: layer(x, positions),
            norm=input_norm,
        )
        return self.residual.finish(state, self.norm)


class AttnResForCausalLM(nn.Module, SupportsQuant):
    """The language model, as vLLM builds, loads and calls it."""

    hf_to_vllm_mapper = WeightsMapper(orig_to_new_stacked=STACKED)
    packed_modules_mapping = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.config = config
        self.model = AttnResModel(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        self.lm_head = ParallelLMHead(
            config.vocab_size,
            config.hidden_size,
            quant_config=vllm_config.quant_config,
            prefix=maybe_prefix(prefix, "lm_head"),
        )
        if config.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        self.logits_processor = LogitsProcessor(config.vocab_size)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Embeddings [T, D] of token ids [T]."""
        return self.model.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """The final norm's output [T, D]. intermediate_tensors: None, for there is no pipeline."""
        return self.model(input_ids, positions, inputs_embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """Logits [T, vocab_size] of the final norm's output [T, D]; None on processes that do not sample."""
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Loads a checkpoint's tensors; returns the names of the parameters that got one."""
        return AutoWeightsLoader(self).load_weights(weights, mapper=self.hf_to_vllm_mapper)
