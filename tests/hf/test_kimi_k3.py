"""Checkpoints in Kimi K3's layout, read as native models: the function, every door, and what is refused."""

import json
import logging
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from attnres import hf
from attnres.errors import Failure, UsageError
from attnres.hf.convert.door import load_pretrained
from attnres.hf.convert.folder import convert_folder
from attnres.run.opening import open as open_model

from .k3_layout import IDS, forward, tensors, text, write
from .letters import LETTERS, letter_tokenizer

KIMI_LINEAR = dict(
    gate_lower_bound=None,
    use_full_rank_gate=None,
    hidden_act="silu",
    q_lora_rank=None,
    mla_use_output_gate=None,
    routed_expert_hidden_size=None,
    latent_moe_use_norm=None,
)
SHAPES = {
    "k3": {},
    "k3 in blocks of three": {"attn_res_block_size": 3, "latent_moe_use_norm": None},
    "one block": {"attn_res_block_size": 12, "activation_situ_linear_beta": 0.0},
    "kimi linear's layers": {**KIMI_LINEAR, "num_shared_experts": 0, "tie_word_embeddings": True},
    "dense": {"num_experts": None, "attn_res_block_size": 1},
    "latent attention alone": {"full_attn_layers": [1, 2, 3, 4, 5], "kda_layers": []},
    "delta attention alone": {"full_attn_layers": [], "kda_layers": [1, 2, 3, 4, 5]},
}


@torch.no_grad()
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("images", [True, False])
def test_logits_are_those_of_the_formulas_also_step_by_step(tmp_path, name, images):
    c = text(**SHAPES[name])
    values = tensors(c)
    write(tmp_path / "k3", c, values, images=images, shards=1 if images else 3)
    expected = forward(values, c, IDS)
    assert expected.std() > 0.3
    model = hf.load(tmp_path / "k3", dtype=torch.float64).eval()
    assert type(model) is hf.AttnResForCausalLM
    torch.testing.assert_close(model(IDS, use_cache=False).logits, expected, rtol=1e-9, atol=1e-9)
    if model.config.counts_tokens:
        step, found = model(IDS[:, :4], use_cache=True), []
        found.append(step.logits)
        for i in range(4, IDS.shape[1]):
            step = model(IDS[:, i : i + 1], past_key_values=step.past_key_values, use_cache=True)
            found.append(step.logits)
        torch.testing.assert_close(torch.cat(found, 1), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(model.to_decoder()(IDS), expected, rtol=1e-9, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize(
    "wrong",
    [
        {"attn_res_block_size": 4},
        {"gate_lower_bound": -4.9},
        {"activation_situ_beta": 1.4},
        {"activation_situ_linear_beta": 2.6},
        {"rms_norm_eps": 1e-4},
        {"routed_scaling_factor": 1.0, "latent_moe_use_norm": None},
    ],
)
def test_every_setting_is_seen_in_the_logits(tmp_path, wrong):
    """The formulas with another value are another function: so equal logits prove each."""
    c = text(**({"latent_moe_use_norm": None} if "latent_moe_use_norm" in wrong else {}))
    values = tensors(c)
    write(tmp_path / "k3", c, values)
    found = hf.load(tmp_path / "k3", dtype=torch.float64).eval()(IDS).logits
    assert (found - forward(values, text(**wrong), IDS)).abs().max() > 1e-6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A bfloat16 checkpoint of a model for images, in three files, with a tokenizer and what else lies there."""
    path = tmp_path_factory.mktemp("published") / "Kimi-K3-Tiny"
    c = text(vocab_size=len(LETTERS) + 1)  # and the end of a document
    values = {name: tensor.bfloat16() for name, tensor in tensors(c).items()}
    write(path, c, values, shards=3, dtype="bfloat16", eos_token_id=3, pad_token_id=3)
    letter_tokenizer("{{ messages }}").save_pretrained(path)
    (path / "README.md").write_text("---\nlicense: other\n---\na Kimi")
    (path / "LICENSE").write_text("its licence")
    (path / "modeling_kimi.py").write_text("raise SystemExit")
    (path / "generation_config.json").write_text('{"max_new_tokens": 7, "eos_token_id": 5}')
    return path


def test_every_door_opens_it_as_a_native_model(folder, caplog):
    caplog.set_level(logging.WARNING)
    model = hf.load(folder)
    assert "the text model alone is read, without 2 tensors for images" in caplog.text
    assert model.dtype == torch.bfloat16 and model.model.layers[3].correction_bias.dtype == torch.float32
    assert hf.load(folder, dtype=torch.float32).dtype == torch.float32
    assert (model.config.eos_token_id, model.generation_config.max_new_tokens) == (3, 7)
    assert model.config.residual_options == {"block_size": 4, "eps": 1e-5, "stream_scale": False}
    for call in (open_model, partial(open_model, pretrained=True), partial(open_model, transformers=True)):
        opened = call(folder, device="cpu")
        assert opened.kind == "native" and type(opened.model) is hf.AttnResForCausalLM
        assert torch.equal(opened.model(IDS % 9).logits, model.eval()(IDS % 9).logits)
    assert type(load_pretrained(folder)) is hf.AttnResForCausalLM
    assert hf.load(folder, attn_implementation="eager").config._attn_implementation == "eager"
    with pytest.raises(UsageError, match="trust_remote_code is not needed"):
        hf.load(folder, trust_remote_code=True)


def test_commands_open_it(server, folder, tmp_path):
    text = "".join(LETTERS[4:9]) * 20
    end = server.run("generate", folder, "--prompt", text[:4], "--tokens", 5, "--temperature", 0)
    assert end.status == 0 and end.out.startswith(text[:4]), end.err
    (tmp_path / "some.txt").write_text(text)
    end = server.run("eval", folder, "--data", tmp_path / "some.txt", "--context", 32, "--device", "cpu")
    assert end.status == 0 and "perplexity" in end.out, end.err
    page = tmp_path / "page.html"
    end = server.run("inspect", folder, "--text", text[:20], "--device", "cpu", "--out", page, "--no-per-read")
    assert end.status == 0 and page.exists(), end.err
    end = server.run("convert", folder, tmp_path / "native")
    assert end.status == 0 and "kimi_k3 -> block_attnres, 10 layers: 0 parameters added" in end.out, end.err
    assert "has Attention Residuals already, in Kimi K3's layout" in end.err


@torch.no_grad()
def test_convert_writes_the_native_layout(folder, tmp_path):
    lines = []
    result = convert_folder(folder, tmp_path / "native", report=lines.append)
    assert result["parameters_added"] == 0 and result["dtype"] == "bfloat16" and result["largest_difference"] is None
    assert "has Attention Residuals already" in lines[0]
    before, after = hf.load(folder, dtype="auto").eval(), hf.load(tmp_path / "native", dtype="auto").eval()
    assert all(torch.equal(value, after.state_dict()[name]) for name, value in before.state_dict().items())
    assert torch.equal(
        before(IDS % 9).logits, AutoModelForCausalLM.from_pretrained(tmp_path / "native", dtype="auto")(IDS % 9).logits
    )
    present = {path.name for path in (tmp_path / "native").iterdir()}
    assert {"tokenizer.json", "chat_template.jinja", "generation_config.json", "LICENSE"} <= present
    assert "modeling_kimi.py" not in present and not [name for name in present if "of-00003" in name]
    assert AutoTokenizer.from_pretrained(tmp_path / "native").chat_template == "{{ messages }}"
    card = (tmp_path / "native" / "README.md").read_text()
    assert "# Kimi-K3-Tiny\n" in card and "connection is attention over depth" in card
    assert "license: other" in card and "a Kimi" in card
    assert "queries at zero" not in card
    with pytest.raises(UsageError, match="has Block AttnRes already, with blocks of its own; leave out --residual"):
        convert_folder(folder, tmp_path / "other", "full_attnres")
    with pytest.raises(UsageError, match="has Block AttnRes already"):
        convert_folder(folder, tmp_path / "other", num_blocks=2)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"quantization_config": {"quant_method": "compressed-tensors", "format": "mxfp4-pack-quantized"}},
         r"is quantised \(compressed-tensors mxfp4-pack-quantized\)"),
        ({"mla_use_nope": False}, "mla_use_nope must be True to be read here; it is False"),
        ({"moe_router_activation_func": "softmax"}, "moe_router_activation_func must be sigmoid .* it is 'softmax'"),
        ({"moe_renormalize": False}, "moe_renormalize must be True to be read here; it is False"),
        ({"num_expert_group": 2}, "num_expert_group must be 1 to be read here; it is 2"),
        ({"topk_group": 2}, "topk_group must be 1"),
        ({"topk_method": "greedy"}, "topk_method must be noaux_tc"),
        ({"moe_layer_freq": 2}, "moe_layer_freq must be 1"),
        ({"hidden_act": "gelu"}, "hidden_act must be silu or situ to be read here; it is 'gelu'"),
        ({"num_key_value_heads": 1}, "num_key_value_heads must be num_attention_heads, 2, to be read here; it is 1"),
        ({"num_nextn_predict_layers": 1}, "num_nextn_predict_layers must be 0 to be read here; it is 1"),
        ({"attn_res_block_size": 0}, "attn_res_block_size must be a positive whole number; it is 0"),
        ({"attn_res_block_size": "4"}, "attn_res_block_size must be a positive whole number"),
        ({"kda_layers": [1, 2]}, r"must name each of the layers 1 .. 5 once; they are \[3, 5\] and \[1, 2\]"),
        ({"head_dim": None}, "linear_attn_config.head_dim is missing in the config.json of the Kimi K3 model"),
        ({"kv_lora_rank": None}, "kv_lora_rank is missing in the config.json"),
        ({"activation_situ_beta": None}, "activation_situ_beta is missing"),
        ({"num_experts_per_token": None}, "num_experts_per_token is missing"),
        ({"gate_lower_bound": 5.0}, "linear_gate_lower_bound must be negative, such as -5, or None; it is 5.0"),
        ({"vocab_size": "many"}, "vocab_size must be a positive whole number"),
        ({"linear_attn_config": [1]}, "linear_attn_config must be an object in the config.json"),
    ],
)  # fmt: skip
def test_what_is_not_computed_is_refused_before_anything_is_loaded(tmp_path, changes, said):
    (tmp_path / "k3").mkdir()  # without weights, whose absence would be said otherwise
    c = {**text(**changes), **{k: v for k, v in changes.items() if k == "linear_attn_config"}}
    config = {"model_type": "kimi_k3", "text_config": c}
    for whole in (config, c):
        (tmp_path / "k3" / "config.json").write_text(json.dumps(whole))
        for call in (hf.load, open_model, load_pretrained, lambda x: convert_folder(x, tmp_path / "out")):
            with pytest.raises(UsageError, match=said) as caught:
                call(tmp_path / "k3")
            assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_kimi_k3_without_attention_residuals_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "kimi_k3", "text_config": text(attn_res_block_size=None)})
    )
    with pytest.raises(UsageError, match="has no attn_res_block_size, and so no Attention Residuals to read"):
        hf.load(tmp_path)


def damaged(change):
    """A folder of which `change` of the tensors, by their names, has been written."""

    def make(path: Path) -> Path:
        c = text()
        write(path, c, change(tensors(c)), images=False)
        return path

    return make


EXPERT = "model.layers.1.block_sparse_moe.experts.2.w2.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: {n: v for n, v in t.items() if n != "model.layers.0.self_attention_res_proj.weight"},
         "do not fit its config.json: missing model.layers.0.self_attention_res_proj.weight$"),
        (lambda t: {n: v for n, v in t.items() if ".experts.2." not in n}, "missing .*2.w1.weight and 11 more"),
        (lambda t: {**t, "model.layers.5.input_layernorm.weight": torch.ones(24)}, "unexpected model.layers.5.input"),
        (lambda t: {**t, EXPERT: torch.ones(16, 8)}, r"experts.2.w2.weight is \[16, 8\], and it must be \[16, 7\]"),
        (lambda t: {n + "_packed" * (n == EXPERT): v for n, v in t.items()},
         "are quantised, such as .*w2.weight_packed"),
        (lambda t: {**t, EXPERT: t[EXPERT].to(torch.float8_e4m3fn)}, "are quantised, such as .*w2.weight, and are"),
    ],
)  # fmt: skip
def test_weights_that_do_not_fit_are_refused_from_their_headers(tmp_path, monkeypatch, change, said):
    path = damaged(change)(tmp_path / "k3")
    monkeypatch.setattr("attnres.hf.kimi_k3.weights.Weights.state_dict", None)  # nothing is read
    with pytest.raises(UsageError, match=said) as caught:
        hf.load(path)
    assert "\n" not in str(caught.value)


def test_files_that_are_missing_or_damaged(tmp_path):
    c = text()
    write(tmp_path / "k3", c, tensors(c), shards=2)
    second = tmp_path / "k3" / "model-00001-of-00002.safetensors"
    whole = second.read_bytes()
    second.write_bytes(whole[:-8])
    with pytest.raises(Failure, match=r"model-00001-of-00002.safetensors is damaged .*; fetch it again"):
        hf.load(tmp_path / "k3")
    second.unlink()
    with pytest.raises(UsageError, match=r"which model.safetensors.index.json names, is not there; fetch it"):
        hf.load(tmp_path / "k3")
    (tmp_path / "k3" / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(Failure, match="cannot be read"):
        hf.load(tmp_path / "k3")
    (tmp_path / "k3" / "model.safetensors.index.json").unlink()
    (tmp_path / "k3" / "model-00000-of-00002.safetensors").unlink()
    with pytest.raises(UsageError, match="holds no safetensors files"):
        hf.load(tmp_path / "k3")


@torch.no_grad()
def test_forms_that_kimi_linear_has_are_the_same_tensors(tmp_path):
    """A_log as [1, 1, H, 1] and convolutions as [N, W]."""
    c = text()
    values = tensors(c)
    write(tmp_path / "k3", c, values, images=False)
    before = hf.load(tmp_path / "k3", dtype=torch.float64)
    file = tmp_path / "k3" / "model.safetensors"
    stored = load_file(file)
    for name, tensor in stored.items():
        if name.endswith("A_log"):
            stored[name] = tensor[None, None, :, None].clone()
        elif "conv1d" in name:
            stored[name] = tensor[:, 0].clone()
    save_file(stored, file)
    after = hf.load(tmp_path / "k3", dtype=torch.float64)
    assert all(torch.equal(value, after.state_dict()[name]) for name, value in before.state_dict().items())
