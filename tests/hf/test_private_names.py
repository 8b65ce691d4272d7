"""The names of transformers and accelerate that are no promise of theirs and that the code relies on: each is there.

Whoever raises the upper bound in pyproject.toml reads from a failure here what has moved, before anything else breaks.
"""

import inspect

import pytest
from torch import nn

pytest.importorskip("transformers")
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    ContinuousBatchingConfig,
    GenerationMixin,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    conversion_mapping,
    dynamic_module_utils,
    masking_utils,
)
from transformers.cache_utils import Cache, DynamicCache, LinearAttentionCacheLayerMixin
from transformers.distributed import DistributedConfig
from transformers.generation.continuous_batching import cb_logits_processors, continuous_api
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto import configuration_auto, tokenization_auto
from transformers.utils import output_capturing

SIZES = dict(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
PROCESSORS = cb_logits_processors.ContinuousBatchingLogitsProcessorList([])
THREAD = continuous_api.BackgroundThreadStatus()

RELIED_ON = [
    # what a model class says of itself
    (PreTrainedModel, "_can_record_outputs _device_mesh _is_stateful _no_split_modules _skip_keys_device_placement"),
    (PreTrainedModel, "_supports_attention_backend _supports_flash_attn _supports_flex_attn _supports_sdpa"),
    (PreTrainedModel, "_can_compile_fullgraph _tied_weights_keys _tp_plan base_model_prefix post_init"),
    (LlamaConfig(**SIZES), "_attn_implementation base_model_pp_plan get_text_config"),
    (output_capturing, "_CAN_RECORD_REGISTRY"),
    # tables that converted classes are entered into
    (AutoModelForCausalLM, "_model_mapping"),
    (configuration_auto, "CONFIG_MAPPING model_type_to_module_name"),
    (configuration_auto.CONFIG_MAPPING, "_mapping _modules"),
    (tokenization_auto, "TOKENIZER_MAPPING TOKENIZER_MAPPING_NAMES MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS"),
    (conversion_mapping, "get_checkpoint_conversion_mapping register_checkpoint_conversion_mapping"),
    (dynamic_module_utils, "get_relative_import_files"),
    # attention and caches
    (ALL_ATTENTION_FUNCTIONS, "get_interface"),
    (masking_utils, "ALL_MASK_ATTENTION_FUNCTIONS create_causal_mask"),
    (Cache, "get_seq_length update update_conv_state update_recurrent_state"),
    (DynamicCache(), "layer_class_to_replicate layers"),
    (DistributedConfig(tp_size=2), "tp_size fsdp_size"),
    # continuous batching, of which the server asks for more than it offers
    (ContinuousBatchingConfig(), "max_batch_tokens num_blocks per_request_processors"),
    (continuous_api.ContinuousBatchingManager, "add_request cancel_request register_result_handler start stop"),
    (continuous_api.OutputRouter(), "result_handlers"),
    (PROCESSORS, "logits_processor supported_keys tensors_required"),
    (THREAD, "can_accept_new_requests fatal_error"),
]


@pytest.mark.parametrize(("owner", "name"), [(owner, name) for owner, names in RELIED_ON for name in names.split()])
def test_it_is_there(owner, name):
    assert hasattr(owner, name)


OVERRIDDEN = [
    (PreTrainedModel, "_init_weights", ["self", "module"]),
    (PreTrainedModel, "_set_gradient_checkpointing", ["self", "enable", "gradient_checkpointing_func"]),
    (PreTrainedModel, "maybe_distribute_model", ["model", "distributed_config"]),
    (GenerationMixin, "init_continuous_batching", None),
    (GenerationMixin, "generate", None),
    (LinearAttentionCacheLayerMixin, "update_conv_state", ["self", "conv_states", "state_idx"]),
    (LinearAttentionCacheLayerMixin, "update_recurrent_state", ["self", "recurrent_states", "state_idx"]),
    (cb_logits_processors.ContinuousBatchingLogitsProcessor, "fill_defaults", ["self", "int32_tensor"]),
    (
        cb_logits_processors.ContinuousBatchingLogitsProcessor,
        "prepare_tensor_args",
        ["self", "requests_with_new_token"],
    ),
    (cb_logits_processors.ContinuousBatchingLogitsProcessor, "__call__", ["self", "scores", "tensor_arg"]),
]


@pytest.mark.parametrize(
    ("owner", "name", "parameters"), OVERRIDDEN, ids=lambda value: getattr(value, "__name__", value)
)
def test_what_is_overridden_is_called_as_before(owner, name, parameters):
    found = list(inspect.signature(getattr(owner, name)).parameters)
    assert parameters is None or found[: len(parameters)] == parameters


def test_checkpointing_is_a_flag_and_a_function_of_a_decoder_layer():
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    model.gradient_checkpointing_enable()
    (layer,) = model.model.layers
    assert layer.gradient_checkpointing is True and callable(layer._gradient_checkpointing_func)


def test_the_state_of_linear_attention_is_kept_by_number():
    kept = inspect.getsource(LinearAttentionCacheLayerMixin.__init__)
    assert all(f"self.{name}" in kept for name in ("conv_states", "recurrent_states", "has_previous_state"))


def test_accelerate_leaves_its_hook_at_the_module():
    module = add_hook_to_module(nn.Linear(1, 1), AlignDevicesHook(offload=True, weights_map={"weight": None}))
    assert vars(module)["_hf_hook"].weights_map == {"weight": None}


def test_a_model_type_that_is_known_is_entered_once():
    with pytest.raises(ValueError, match="already used"):
        AutoConfig.register("llama", LlamaConfig)
