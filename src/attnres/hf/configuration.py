"""The decoder's configuration as a Hugging Face one: the same fields, saved and loaded as `config.json`."""

import dataclasses
import difflib
from typing import Any

from transformers import PreTrainedConfig

from ..errors import UsageError
from ..model.config import DecoderConfig

_FIELDS = [field.name for field in dataclasses.fields(DecoderConfig)]


class AttnResConfig(PreTrainedConfig, DecoderConfig):  # type: ignore[misc]  # from_dict is Hugging Face's
    """Shape of an AttnRes model: every field of `attnres.model.DecoderConfig`, and Hugging Face's own.

    It is a DecoderConfig, so the decoder's modules are built from it directly. Raises UsageError for values that do not
    fit together, for a misspelt field, and for scaled rotary positions, which the decoder does not have.
    """

    model_type = "attnres"
    keys_to_ignore_at_inference = ["past_key_values"]
    base_model_tp_plan = {
        "layers.*.q_proj": "colwise",
        "layers.*.k_proj": "colwise",
        "layers.*.v_proj": "colwise",
        "layers.*.o_proj": "rowwise",
        "layers.*.gate_proj": "colwise",
        "layers.*.up_proj": "colwise",
        "layers.*.down_proj": "rowwise",
    }
    # norms before layers: a residual connection reads a layer's norm before the layer gathers its weights
    base_model_fsdp_plan = {
        "embed_tokens": "free_full_weight",
        "layers.*.norm": "free_full_weight",
        "layers.*": "free_full_weight",
        "norm": "keep_full_weight",
    }

    use_cache: bool = True
    """Keep keys and values of earlier tokens during generation."""
    pad_token_id: int | None = None
    """Id of the padding token; padding may also be named by the attention mask alone."""
    bos_token_id: int | None = None
    """Id of the token that begins a text."""
    eos_token_id: int | list[int] | None = None
    """Id or ids at which generation stops."""

    def __post_init__(self, **kwargs: Any) -> None:
        rope = kwargs.pop("rope_parameters", None) or kwargs.pop("rope_scaling", None)
        if rope is not None:
            if rope.get("rope_type", rope.get("type", "default")) != "default":
                raise UsageError(f"AttnRes models have unscaled rotary positions; give rope_theta alone, not {rope}")
            self.rope_theta = float(rope.get("rope_theta", self.rope_theta))
        for name in kwargs:
            near = difflib.get_close_matches(name, _FIELDS, n=1, cutoff=0.85)
            if near:
                raise UsageError(f"AttnResConfig has no field {name!r}; did you mean {near[0]!r}?")
        DecoderConfig.__post_init__(self)
        if "mla" not in self.attention_kinds:  # engines take a model with these sizes for one of latent attention
            self.kv_lora_rank = self.qk_nope_head_dim = self.qk_rope_head_dim = self.v_head_dim = None
        super().__post_init__(**kwargs)
        if self.is_hybrid:  # transformers has no style for their parameters; `hybrid_parallel` splits them
            self.base_model_tp_plan = {"embed_tokens": "embedding_rowwise"}  # type: ignore[misc]

    @property
    def is_hybrid(self) -> bool:
        """Whether there are layers that are not split by the names in transformers' plan, such as delta attention."""
        plan = type(self).base_model_tp_plan
        return not all(kind.split for kind in self.layer_kinds) or any(
            (plan.get(f"layers.*.{path.removesuffix('.weight')}"),) != ("colwise", "rowwise")[dim : dim + 1]
            for kind in set(self.layer_kinds)
            for path, dim in kind.split.items()
        )

    @property
    def counts_tokens(self) -> bool:
        """Whether a Hugging Face cache knows how many tokens it has, which layers with a state alone do not say."""
        return set(self.layer_types) != {"linear_attention"}

    @property
    def layer_types(self) -> list[str]:
        """What a Hugging Face cache keeps for each Transformer block."""
        return [kind.cache_type for kind in self.layer_kinds if kind.is_attention]

    def decoder_config(self) -> DecoderConfig:
        """The plain configuration of `attnres.model.Decoder`."""
        return DecoderConfig(**{name: getattr(self, name) for name in _FIELDS})
