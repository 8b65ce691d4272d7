"""The decoder as Hugging Face models: the same modules and loop, with transformers' attention functions and caches.

`AttnResModel` is the decoder without its head, `AttnResForCausalLM` the language model. Weights are named as in
`attnres.model.Decoder`, those of the base model behind "model.".
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel, initialization
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple, logging

from ..errors import Failure, UsageError
from ..model.decoder import Backbone, Decoder, expert_std, initial_std
from ..model.layers.gqa import Context, lengths_vary, rotary_factors
from ..residual.base import Residual, State
from .attention import AttentionInterface, attend_by_config
from .cache import LayerCache, check_cache, check_generation, check_paged
from .configuration import AttnResConfig
from .device_map import hidden_across_devices, is_dispatched
from .engines import StaysWhole, adapt_to_vllm
from .packing import find_packing
from .remote_code import check_class, saving
from .residual_place import check_verbs, rows_on
from .self_speculation import DraftsItself
from .tensor_parallel import SharesTokens, shards_of

logger = logging.get_logger(__name__)

MASKS = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}
"""What makes the masks of a layer, by its `Layer.cache_type`."""


NAMES = {
    "AutoConfig": "hf.configuration.AttnResConfig",
    "AutoModel": "hf.modeling.AttnResModel",
    "AutoModelForCausalLM": "hf.modeling.AttnResForCausalLM",
    "AutoModelForSequenceClassification": "hf.heads.AttnResForSequenceClassification",
    "AutoModelForTokenClassification": "hf.heads.AttnResForTokenClassification",
}


def names_of(model: Any) -> dict[str, str]:
    """`remote_code.Names` of a native model."""
    check_class(model, ["hf.modeling", "hf.heads"])
    return NAMES


class AttnResPreTrainedModel(StaysWhole, SharesTokens, PreTrainedModel):
    """What transformers needs to know of both models."""

    config: AttnResConfig
    config_class = AttnResConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["RMSNorm"]  # a unit of its own: a residual connection reads a layer's before the layer runs
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    save_pretrained = saving(PreTrainedModel.save_pretrained, names_of, card=False)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, Residual):
            module.reset_parameters()
        elif isinstance(module, nn.Linear) and hasattr(module, "initial_std"):
            std: Any = module.initial_std
            initialization.normal_(module.weight, std=std)
        elif hasattr(module, "initial_stds"):
            layer: Any = module
            device = next(layer.parameters()).device
            for name, value in layer.initial_values(layer.initial_stds.__getitem__, None, device):  # torch's generator
                initialization.copy_(getattr(module, name), value)
            for buffer in module.buffers(recurse=False):
                initialization.zeros_(buffer)
        else:
            super()._init_weights(module)

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Any = checkpoint, every_n_layers: int = 1
    ) -> None:
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func)
        base: Any = self.base_model
        base.checkpoint_every = every_n_layers
        # a state is no tensor, in which the reentrant form would find no gradients
        base.checkpoint = partial(gradient_checkpointing_func, use_reentrant=False)

    @classmethod
    def maybe_distribute_model(cls, model: Any, distributed_config: Any, mesh: Any) -> Any:
        """transformers' hook between making a model and loading its weights."""
        splits = mesh is not None and distributed_config.tp_size > 1 and model.config.is_hybrid
        if splits:
            from .hybrid_parallel import check_sizes, split_layers  # torch.distributed is not everywhere

            check_sizes(model.config, distributed_config)
        model = super().maybe_distribute_model(model, distributed_config, mesh)
        if splits:
            devices = model._device_mesh
            split_layers(model.base_model, devices["tp"] if devices.ndim > 1 else devices)
        return model


class AttnResModel(AttnResPreTrainedModel, Backbone):
    """The decoder without its output head, as `AutoModel` loads it."""

    config: AttnResConfig

    def __init__(self, config: AttnResConfig) -> None:
        super().__init__(config)
        adapt_to_vllm(config)
        self.add_modules(config)
        for layer in self.layers:
            if hasattr(layer, "num_key_value_groups"):  # it attends over keys and values
                layer.interface = AttentionInterface(layer)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                module.initial_std = initial_std(self, name)  # type: ignore[assignment]
        for layer in self.layers:
            layer.initial_stds = {role: expert_std(self, role) for role in ("value", "output")}  # type: ignore[assignment]
        self._no_split_modules = ["RMSNorm", *{type(layer).__name__ for layer in self.layers}]
        if config.is_hybrid:
            self._can_compile_fullgraph = False  # the sizes of experts' batches go to the host
        self._is_stateful = "linear_attention" in config.layer_types
        self.post_init()

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether each Transformer block is recomputed in the backward pass; transformers sets it."""
        return self.checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, enabled: bool) -> None:
        self.enable_checkpointing(enabled)

    def sublayers(self) -> nn.ModuleList:
        """What adds to the residual stream."""
        return self.layers

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor] | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Runs the decoder on token ids [B, T] or embeddings [B, T, D].

        Args:
            attention_mask: [B, past + T], 0 at padding; or a mask of the form that the attention implementation takes.
            position_ids: [B, T]; the default counts on from the cache. Where they do not rise, another sequence begins
                in the row, and no layer sees from one into the other; there is then no cache.
            past_key_values: a Hugging Face cache; the tokens follow those that it holds.
            output_attentions: also return attention weights; needs attn_implementation="eager".
            output_hidden_states: also return what each Transformer block reads from the residual connection, before
                its norm, and last the output of the final norm.
            kwargs: handed to the attention function; of them cu_seq_lens_q, int [N + 1], also says where the sequences
                of a single row begin and end.

        Raises UsageError for packed sequences that some layer or the cache could not keep apart.
        """
        check_verbs(self.residual)
        if (input_ids is None) == (inputs_embeds is None):
            raise UsageError("give either input_ids or inputs_embeds, not both or none")
        if any(isinstance(layer, nn.Identity) for layer in self.layers):
            raise UsageError(
                "the model must be whole: pipeline stages would have to hand on the whole state of the residual "
                "connection, and this engine's hand on hidden states; use tensor parallelism"
            )
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if inputs_embeds.shape[1] == 0:
            raise UsageError("the prompt is empty; give at least one token")
        recomputed = self.checkpointing and torch.is_grad_enabled()
        if recomputed and (use_cache or past_key_values is not None):
            logger.warning_once("gradient checkpointing excludes a cache of keys and values; going on without one")
        if recomputed:
            # computing a block again would add its keys and values a second time
            use_cache, past_key_values = False, None
        padding: Any = attention_mask
        given: dict[str, Any]
        if isinstance(attention_mask, dict):  # what generate makes for a static cache: a mask for each kind of layer
            given, padding = attention_mask, attention_mask.get("linear_attention")
            attention_mask = next((given[kind] for kind in MASKS if given.get(kind) is not None), None)
        else:
            windowed = _within_window(attention_mask, self.config.sliding_window)
            given = {"full_attention": attention_mask, "sliding_attention": windowed}
        is_padding = isinstance(attention_mask, Tensor) and attention_mask.dim() == 2
        has_own_masks = attention_mask is not None and not is_padding
        packing = find_packing(
            self.config,
            (inputs_embeds.shape[0], inputs_embeds.shape[1]),
            position_ids,
            kwargs.get("cu_seq_lens_q"),
            padding,
            with_cache=bool(use_cache) or past_key_values is not None,
            has_own_masks=has_own_masks,
        )
        if use_cache is None:
            use_cache = packing is None and self.config.use_cache and self.config.counts_tokens
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if past_key_values is not None:
            check_cache(past_key_values, self.config)
        if packing is not None:
            given = given if has_own_masks else {}
            position_ids = packing.positions if position_ids is None else position_ids
        elif position_ids is None:
            past = 0 if past_key_values is None else past_key_values.get_seq_length()
            position_ids = (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + past)[None]
        masks = {
            kind: create(
                config=self.config,
                inputs_embeds=inputs_embeds,
                attention_mask=given.get(kind),
                past_key_values=past_key_values,
                position_ids=None if packing is None else packing.positions,
            )
            for kind, create in MASKS.items()
            if kind in self.config.layer_types
        }
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        attentions: list[Tensor] = []
        reads: list[Tensor] = []

        def observe(state: State, layer: int) -> None:
            if layer % 2 == 0:
                reads.append(rows_on(self.residual, inputs_embeds.device).read(state, layer)[0])

        attend = partial(
            attend_by_config,
            weights=attentions if output_attentions else None,
            position_ids=position_ids if packing is None else packing.positions,
            **kwargs,
        )
        assert self.config.head_dim is not None
        cos, sin = rotary_factors(position_ids, self.config.head_dim, self.config.rope_theta)
        shards = shards_of(self, inputs_embeds.shape[1])
        context = Context(
            cos,
            sin,
            masks.get("full_attention"),
            None if past_key_values is None else LayerCache(past_key_values),
            attend,
            # accelerate brings weights for calls of modules, and the absorbed form calls none; flash kernels want heads
            # of at most 256
            absorb=not is_dispatched(self) and self.config._attn_implementation in ("sdpa", "eager"),
            present=_present(padding, inputs_embeds),
            cu_seqlens=None if packing is None else packing.cu_seqlens,
            window_mask=masks.get("sliding_attention"),
        )
        watch = observe if output_hidden_states else None
        if shards is None and is_dispatched(self):
            hidden = hidden_across_devices(self, inputs_embeds, context, watch)
        else:
            hidden = self.hidden(inputs_embeds, context, watch, shards)
        if shards is not None:
            reads = [shards.gather(read) for read in reads]
        return BaseModelOutputWithPast(
            last_hidden_state=hidden,
            past_key_values=past_key_values,
            hidden_states=(*reads, hidden) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )


def _within_window(mask: Any, window: int | None) -> Any:
    """A caller's own mask [..., T, S] for layers that look back over `window` tokens; others as they are."""
    if window is None or not isinstance(mask, Tensor) or mask.dim() != 4:
        return mask
    tokens, keys = mask.shape[-2:]
    position = torch.arange(keys, device=mask.device)
    hidden = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    return mask.masked_fill(position[keys - tokens :, None] - position >= window, hidden)


def _present(attention_mask: Tensor | None, inputs_embeds: Tensor) -> Tensor | None:
    """[B, T, 1], 0 where a new token is padding, or None if there is no such mask."""
    if attention_mask is None or attention_mask.dim() != 2:
        return None
    return attention_mask[:, -inputs_embeds.shape[1] :, None].to(inputs_embeds.dtype)


class AttnResForCausalLM(DraftsItself, AttnResPreTrainedModel, GenerationMixin):
    """Language model over AttnRes, as `AutoModelForCausalLM` loads it."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: AttnResConfig) -> None:
        super().__init__(config)
        self.model = AttnResModel(config)
        self.vocab_size = config.vocab_size
        self._is_stateful = self.model._is_stateful
        self._can_compile_fullgraph = self.model._can_compile_fullgraph
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [B, T, vocab_size], and the mean loss in nats per token where labels are given.

        Args:
            labels: [B, T], the token ids themselves (they are shifted here); -100 is left out of the loss.
            logits_to_keep: compute logits for the last so many positions (0: all), or for these positions [n].
            kwargs: those of `AttnResModel.forward`, which also explains the other arguments.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' `generate`. Raises UsageError, before anything runs, for a cache that the model cannot have."""
        given = kwargs.get("generation_config") or self.generation_config
        check_generation(self.config, kwargs.get("use_cache", given.use_cache))
        with lengths_vary():
            return super().generate(*args, **kwargs)  # type: ignore[misc]

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' manager of continuous batching. Raises UsageError if its cache has no place for some layer."""
        check_paged(self.config)
        return super().init_continuous_batching(*args, **kwargs)

    @classmethod
    def from_run(cls, folder: str | Path, **options: Any) -> "AttnResForCausalLM":
        """The model of a training run, with its newest whole checkpoint.

        Args:
            folder: what `attnres train` wrote to --out; or one of its checkpoints/step-N, for that step.
            options: of `from_pretrained`, such as dtype, device_map or attn_implementation.

        The tokenizer of the run is `AutoTokenizer.from_pretrained(folder)`. Raises UsageError if `folder` is no run or
        its weights do not fit its configuration, Failure if a file is damaged.
        """
        from ..run.find import find_run  # not in the code that a folder carries

        run = find_run(folder)
        end = run.end_of_document
        config = AttnResConfig(**run.config.to_dict(), eos_token_id=end, pad_token_id=end)
        options.setdefault("generation_config", GenerationConfig(eos_token_id=end, pad_token_id=end))
        options |= {"output_loading_info": True, "ignore_mismatched_sizes": True, "use_safetensors": True}
        try:
            # a decoder's own names load as they are: transformers puts "model." in front of a base model's
            with run.weights() as weights:
                loaded: Any = cls.from_pretrained(weights, config=config, **options)
        except SafetensorError as error:
            raise Failure(f"the weights in {run.checkpoint} are damaged ({error}); take an earlier step") from error
        model, report = loaded
        for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            for key in report[problem]:
                raise UsageError(
                    f"the weights in {run.checkpoint} do not fit {run.folder / 'config.json'}: "
                    f"{problem.replace('_', ' ')}, such as {key if isinstance(key, str) else key[0]}"
                )
        return model

    @classmethod
    def from_decoder(cls, decoder: Decoder) -> "AttnResForCausalLM":
        """A model with a copy of a decoder's weights, in their dtype and on their device."""
        model = cls(AttnResConfig(**decoder.config.to_dict())).to(decoder.embed_tokens.weight)  # type: ignore[arg-type]
        model.load_state_dict(
            {name if name.startswith("lm_head.") else f"model.{name}": t for name, t in decoder.state_dict().items()}
        )
        return model

    def to_decoder(self) -> Decoder:
        """A plain decoder with a copy of the weights, in their dtype and on their device."""
        decoder = Decoder(self.config.decoder_config()).to(self.model.embed_tokens.weight)
        decoder.load_state_dict({name.removeprefix("model."): t for name, t in self.state_dict().items()})
        return decoder
