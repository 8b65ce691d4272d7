"""What cannot be converted is refused with the reason, in one sentence, and left as it was."""

from functools import partial

import pytest
import torch
import transformers
from torch import nn
from transformers import (
    BertConfig,
    BertLMHeadModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from attnres import hf
from attnres.errors import UsageError
from attnres.hf.convert import table
from attnres.hf.convert.door import load_pretrained
from attnres.hf.convert.folder import convert_folder
from attnres.hf.convert.table import Architecture
from attnres.model import Decoder, DecoderConfig
from attnres.run.opening import open as open_model

from .converted import ALL, COMMON, SHAPE, VOCAB, build, tokens


def bert():
    return BertLMHeadModel(BertConfig(**SHAPE, intermediate_size=48, is_decoder=True))


def t5():
    sizes = {"vocab_size": VOCAB, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    return T5ForConditionalGeneration(T5Config(**sizes))


def opt():
    return OPTForCausalLM(OPTConfig(**SHAPE, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=64))


def mamba():
    return transformers.MambaForCausalLM(transformers.MambaConfig(vocab_size=VOCAB, hidden_size=8, num_hidden_layers=1))


def of_another_type():
    if not hasattr(transformers, "InternLM3Config"):
        pytest.skip("this transformers has no class that serves two types")
    config = transformers.InternLM3Config(**{**COMMON, "head_dim": 8})
    return transformers.AutoModelForCausalLM.from_config(config)


def cross_attending():
    sizes = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4}
    return GPT2LMHeadModel(GPT2Config(**sizes, add_cross_attention=True, is_decoder=True))


def with_its_own_layer():
    class Mine(LlamaDecoderLayer):
        pass

    model = build("llama")
    model.model.layers[1] = Mine(model.config, 1)
    return model


def with_another_submodule():
    model = build("llama")
    model.model.layers[1].adapter = nn.Linear(32, 32)
    return model


def without_a_norm():
    model = build("llama")
    del model.model.layers[2].post_attention_layernorm
    return model


def with_a_hooked_layer():
    model = build("llama")
    model.model.layers[0].forward = lambda hidden_states, **_: hidden_states
    return model


def shortened():
    model = build("llama")
    model.model.layers = model.model.layers[:2]
    return model


def quantised_on_loading():
    model = build("llama")
    model.config.quantization_config = {"quant_method": "bitsandbytes"}
    return model


def with_integer_weights():
    model = build("llama")
    integers = nn.Parameter(torch.zeros(32, 32, dtype=torch.int8), requires_grad=False)
    model.model.layers[1].self_attn.q_proj.weight = integers
    return model


def spread():
    model = build("llama")
    model.hf_device_map = {"model.layers.0": 0, "model.layers.1": 1}
    return model


def adapted():
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(build("llama"), peft.LoraConfig(target_modules=["q_proj"]))


def native():
    return hf.AttnResForCausalLM(hf.AttnResConfig(**SHAPE))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: nn.Linear(2, 2), "must be a transformers PreTrainedModel; it is a Linear"),
        (lambda: Decoder(DecoderConfig(hidden_size=32, num_hidden_layers=1)), "it is a Decoder"),
        (lambda: "gpt2", "it is a str"),
        (adapted, "it is a PeftModel; merge the adapter"),
        (native, "has Attention Residuals already"),
        (lambda: hf.convert(build("llama")), "AttnResLlamaForCausalLM has Attention Residuals already"),
        (bert, "'bert' cannot be converted exactly: it normalises the stream"),
        (t5, "'t5' is an encoder-decoder"),
        (opt, "decoder layer 0, a OPTDecoderLayer, computes another sum .*set its dropout to 0"),
        (of_another_type, "the LlamaForCausalLM has a InternLM3Config, .* make it of a LlamaConfig"),
        (mamba, "'mamba' is not in the table.* and like none that is there: .*register"),
        (cross_attending, "crossattention, ln_cross_attn"),
        (with_its_own_layer, "layer 1, a Mine, is none of transformers' own"),
        (with_another_submodule, "layer 1.* has adapter"),
        (without_a_norm, "layer 2.* lacks post_attention_layernorm"),
        (with_a_hooked_layer, "layer 0.* forward replaced"),
        (shortened, "2 decoder layers but its config says num_hidden_layers=3"),
        (quantised_on_loading, "quantised; convert the original"),
        (with_integer_weights, r"layers.1.self_attn.q_proj \(Linear\) is quantised"),
        (spread, "several devices"),
    ],
)
def test_models(make, reason):
    model = make()
    before = type(model)
    with pytest.raises(UsageError, match=reason) as caught:
        hf.convert(model)
    assert "\n" not in str(caught.value)
    assert type(model) is before


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"num_blocks": 7}, "num_blocks"),
        ({"num_blocks": 0}, "num_blocks"),
        ({"block_size": -1}, "block_size"),
        ({"num_blocks": 2, "block_size": 3}, "num_blocks"),
        ({"residual": "full_attnres", "num_blocks": 2}, "'full_attnres' has no option 'num_blocks'"),
        ({"residual": "blok_attnres"}, "did you mean 'block_attnres'"),
        ({"residual": "prenorm"}, "must be one of block_attnres, full_attnres"),
        ({"stream_scale": False}, "stream_scale must stay True"),
        ({"residual": "full_attnres", "window": 2}, "window must stay None"),
        ({"blocks": 3}, "no option 'blocks'"),
        ({"eps": -1.0}, "eps"),
    ],
)
@torch.no_grad()
def test_options(options, reason):
    model = build("llama")
    expected, keys = model(tokens()).logits, set(model.state_dict())
    with pytest.raises(UsageError, match=reason) as caught:
        hf.convert(model, **options)
    assert "\n" not in str(caught.value)
    assert type(model) is LlamaForCausalLM and type(model.config) is LlamaConfig
    assert set(model.state_dict()) == keys
    assert torch.equal(model(tokens()).logits, expected)


def test_parallel_branches_cannot_run_two_phase():
    with pytest.raises(UsageError, match="two_phase"):
        hf.convert(build("gpt_neox_parallel"), schedule="two_phase")
    model = hf.convert(build("gpt_neox_parallel"), num_blocks=2)
    assert model.gpt_neox.residual.schedule == "layerwise"
    model.gpt_neox.residual.schedule = "two_phase"
    with torch.no_grad(), pytest.raises(UsageError, match="may not"):
        model(tokens())
    hf.convert(build("gpt_neox"), schedule="two_phase")


@pytest.mark.parametrize(
    ("name", "changes", "entry", "reason"),
    [
        ("Doge", {}, {}, "input_residual, post_attention_residual of its own"),
        ("MiniMax", {"num_local_experts": 2, "block_size": 4}, {}, "computes another sum"),
        ("Helium", {}, {"parallel": True}, "computes another sum"),
        ("Helium", {}, {"attention_norm": "post_attention_layernorm", "mlp_norm": "input_layernorm"}, "another sum"),
        ("Helium", {}, {"multiplier": "hidden_size"}, "another sum"),
    ],
)
def test_entries_that_do_not_describe_the_layer(monkeypatch, name, changes, entry, reason):
    sizes = {**COMMON, "head_dim": 8, "bos_token_id": 1, "eos_token_id": 2, **changes}
    config = getattr(transformers, f"{name}Config")(**sizes)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    others = {key: entries for key, entries in table.ARCHITECTURES.items() if key != config.model_type}
    monkeypatch.setattr(table, "ARCHITECTURES", others)
    monkeypatch.setattr(table, "NOT_EXACT", {})
    table.register(Architecture(config.model_type, **entry))
    with pytest.raises(UsageError, match=reason) as caught:
        hf.convert(model)
    assert "\n" not in str(caught.value) and type(model).__name__ == f"{name}ForCausalLM"


@pytest.mark.parametrize("name", sorted({"llama", "kimi_linear"} & set(ALL)))
def test_attention_over_depth_that_transformers_would_leave_out(tmp_path, name):
    """A kimi_linear folder is read as Kimi K3's, and transformers' class of it writes no such layout."""
    model = build(name, torch.float32, attn_res_block_size=2)
    said = r"attn_res_block_size=2, so the model was trained with attention over depth"
    with pytest.raises(UsageError, match=said):
        hf.convert(model)
    model.save_pretrained(tmp_path / "model")
    pretrained = partial(open_model, pretrained=True)
    for call in (open_model, pretrained, hf.load, load_pretrained, lambda x: convert_folder(x, tmp_path / "out")):
        with pytest.raises(
            UsageError, match=said if name == "llama" else "of Kimi K3 models mla_use_nope must be True"
        ):
            call(tmp_path / "model")
    assert not (tmp_path / "out").exists()
    hf.convert(build(name, attn_res_block_size=None))


def test_layers_out_of_turn():
    model = hf.convert(build("llama"))
    with pytest.raises(UsageError, match="only the first decoder layer"):
        model.model.layers[1](torch.zeros(1, 2, 32, dtype=torch.float64))
    encoded = {"encoder_hidden_states": torch.zeros(2, 3, 32, dtype=torch.float64)}
    with pytest.raises(UsageError, match="encoder_hidden_states must be None"):
        hf.convert(build("gpt2"))(tokens(), **encoded)
