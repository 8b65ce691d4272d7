"""Models in Kimi K3's checkpoint layout: read back they compute the same, and nothing is ever half-written."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import attnres.run
from attnres.cli import main
from attnres.data.tokenizer import ByteTokenizer
from attnres.errors import Failure, UsageError
from attnres.export import export_model, kimi_k3
from attnres.hf import load
from attnres.hf.kimi_k3.names import ATTENTION, FEED_FORWARD, LOW_RANK_GATE, OUTPUT_READ, OUTSIDE, READS

from .k3_models import MODELS, model

IDS = torch.randint(0, 257, (2, 20), generator=torch.Generator().manual_seed(0))


def saved(ours, folder):
    ours.save_pretrained(folder)
    ByteTokenizer().save(folder)
    return folder


def tensors(folder):
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return found


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_what_is_read_back_computes_the_same(tmp_path, name):
    ours = model(name)
    result = export_model(saved(ours, tmp_path / "native"), tmp_path / "out", "kimi-k3")
    back = load(tmp_path / "out", dtype=torch.float64).eval()
    difference = (back(IDS).logits - ours.double()(IDS).logits).abs().max()
    assert difference < (2e-2 if name == "scaled" else 1e-5)
    assert result["layers"] == 8 and result["block_size"] == (3 if name == "tied" else 2)
    assert result["bytes"] == sum(file.stat().st_size for file in (tmp_path / "out").iterdir())
    text = json.loads((tmp_path / "out/config.json").read_text())["text_config"]
    assert text["linear_attn_config"]["full_attn_layers"] == [4, 8] and text["eos_token_id"] == 256
    assert text["first_k_dense_replace"] == (1 if "num_experts" in MODELS[name] else 8)


def test_every_tensor_is_in_the_table_and_of_its_shape(tmp_path):
    """Shapes as llama.cpp's loader wants them, but for its order of dimensions."""
    export_model(saved(model("kimi_k3"), tmp_path / "native"), tmp_path / "out", "kimi-k3")
    found = {name.removeprefix("language_model."): list(t.shape) for name, t in tensors(tmp_path / "out").items()}
    rows = [row for kinds in (ATTENTION, FEED_FORWARD) for kind in kinds.values() for row in kind]
    known = {row.theirs for row in (*rows, *LOW_RANK_GATE)}
    known |= {f"{read.theirs}_{part}.weight" for read in READS for part in ("norm", "proj")}
    outside = {row.theirs for row in OUTSIDE} | {f"{OUTPUT_READ.theirs}_{part}.weight" for part in ("norm", "proj")}
    for name in found:
        inside = re.sub(r"^model\.layers\.\d+\.", "", name)
        assert name in outside or re.sub(r"experts\.\d+\.", "experts.{expert}.", inside) in known, name
    attention, mlp = "model.layers.0.self_attn.", "model.layers.1.block_sparse_moe."
    expected = {
        "model.embed_tokens.weight": [512, 128], "lm_head.weight": [512, 128], "model.norm.weight": [128],
        "model.output_attn_res_norm.weight": [128], "model.output_attn_res_proj.weight": [1, 128],
        "model.layers.0.mlp_res_proj.weight": [1, 128], "model.layers.0.mlp.down_proj.weight": [128, 352],
        f"{attention}q_proj.weight": [128, 128], f"{attention}k_conv1d.weight": [128, 1, 4],
        f"{attention}A_log": [4], f"{attention}dt_bias": [128], f"{attention}f_a_proj.weight": [32, 128],
        f"{attention}g_proj.weight": [128, 128], f"{attention}o_norm.weight": [32],
        "model.layers.3.self_attn.q_b_proj.weight": [4 * 48, 48], "model.layers.3.self_attn.q_a_layernorm.weight": [48],
        "model.layers.3.self_attn.kv_a_proj_with_mqa.weight": [64 + 16, 128],
        "model.layers.3.self_attn.kv_b_proj.weight": [4 * 64, 64], "model.layers.3.self_attn.g_proj.weight": [128, 128],
        f"{mlp}gate.weight": [8, 128], f"{mlp}gate.e_score_correction_bias": [8],
        f"{mlp}experts.7.w1.weight": [96, 64], f"{mlp}experts.7.w2.weight": [64, 96],
        f"{mlp}shared_experts.up_proj.weight": [96, 128], f"{mlp}routed_expert_down_proj.weight": [64, 128],
        f"{mlp}routed_expert_norm.weight": [64],
    }  # fmt: skip
    assert {name: found.get(name) for name in expected} == expected
    assert not any("g_a_proj" in name for name in found)


def test_the_two_factors_of_a_gate_are_one_matrix(tmp_path):
    ours = model("dense").bfloat16()
    export_model(saved(ours, tmp_path / "native"), tmp_path / "out", "kimi-k3")
    layer = ours.model.layers[0]
    found = tensors(tmp_path / "out")["language_model.model.layers.0.self_attn.g_proj.weight"]
    product = layer.g_b_proj.weight.double() @ layer.g_a_proj.weight.double()
    assert found.dtype == torch.bfloat16 and torch.equal(found, product.bfloat16())


def test_tied_embeddings_are_written_twice(tmp_path):
    export_model(saved(model("tied"), tmp_path / "native"), tmp_path / "out", "kimi-k3")
    found = tensors(tmp_path / "out")
    assert torch.equal(found["language_model.model.embed_tokens.weight"], found["language_model.lm_head.weight"])


def test_a_temperature_is_in_the_queries(tmp_path):
    ours = model("dense", residual_options={"block_size": 4, "stream_scale": False, "temperature": 2.0})
    export_model(saved(ours, tmp_path / "native"), tmp_path / "out", "kimi-k3")
    with torch.no_grad():
        assert torch.allclose(load(tmp_path / "out").eval()(IDS).logits, ours(IDS).logits, atol=1e-4)


def test_silu_is_the_limit_of_situ():
    gate = torch.linspace(-100, 100, 20001, dtype=torch.float64)
    silu = torch.nn.functional.silu(gate)
    error = (kimi_k3.BETA * torch.tanh(gate / kimi_k3.BETA) * gate.sigmoid() - silu).abs()
    assert (error <= 1e-6 * silu.abs())[gate.abs() < 20].all() and (error <= 2e-5 * silu.abs()).all()


def test_large_models_are_in_shards(tmp_path, monkeypatch):
    ours = model("experts")
    monkeypatch.setattr(kimi_k3, "SHARD_BYTES", 2_000_000)
    export_model(saved(ours, tmp_path / "native"), tmp_path / "out", "kimi-k3")
    files = sorted(file.name for file in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    found = tensors(tmp_path / "out")
    assert set(index["weight_map"]) == set(found) and set(index["weight_map"].values()) == set(files)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in found.values())
    assert all((tmp_path / "out" / file).stat().st_size < 2_100_000 for file in files)
    with torch.no_grad():
        assert torch.allclose(load(tmp_path / "out").eval()(IDS).logits, ours(IDS).logits, atol=1e-4)


def test_tokenizer_template_and_settings_come_along(tmp_path):
    folder = saved(model("dense", eos_token_id=[256, 7], bos_token_id=3), tmp_path / "native")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "notes.txt").write_text("mine")
    export_model(folder, tmp_path / "out", "kimi-k3")
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"} < names
    assert "notes.txt" not in names
    assert json.loads((tmp_path / "out/config.json").read_text())["eos_token_id"] == [256, 7]
    opened = attnres.run.open(tmp_path / "out", device="cpu")
    assert opened.tokenizer.decode(opened.tokenizer.encode("text")) == "text"


REFUSED = {
    "attention is kda and mla.* has gqa layers": {"attention_pattern": ["kda", "gqa"]},
    "has sliding_window layers": {"attention_pattern": ["sliding_window", "mla"], "sliding_window": 8},
    "is Block AttnRes, and the model's is full_attnres": {"residual": "full_attnres", "residual_options": {}},
    "the model's is prenorm": {"residual": "prenorm", "residual_options": {}},
    "the model's have 3 layers": {"residual_options": {"block_size": 3}},
    "of 2 layers and the last of 4": {"residual_options": {"num_blocks": 7}},
    "has no heads": {"residual_options": {"block_size": 4, "heads": 2}},
    "has no null_source": {"residual_options": {"block_size": 4, "null_source": True}},
    "has no mixing.*'sigmoid'": {"residual_options": {"block_size": 4, "mixing": "sigmoid"}},
    "has no mixing.*'static'": {"residual_options": {"block_size": 4, "mixing": "static"}},
    "has no query": {"residual_options": {"block_size": 4, "query": "input"}},
    "has no key_normalised": {"residual_options": {"block_size": 4, "key_normalised": False}},
    "has no reads": {"residual_options": {"block_size": 4, "reads": "transformer_block"}},
    "linear_num_heads 2 and num_attention_heads 4": {"linear_num_heads": 2},
}


@pytest.mark.parametrize("said", REFUSED)
@pytest.mark.parametrize("to", ["kimi-k3", "gguf"])
def test_what_the_layout_has_no_words_for_is_refused(tmp_path, said, to):
    pytest.importorskip("gguf")
    folder = saved(model("dense", **REFUSED[said]), tmp_path / "native")
    with pytest.raises(UsageError, match=said) as caught:
        export_model(folder, tmp_path / "out", to)
    assert "\n" not in str(caught.value) and "export" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["native"]


def test_uneven_ends_and_one_block_are_expressed(tmp_path):
    short = model("dense", residual_options={"block_size": 6, "stream_scale": False})
    whole = model("dense", residual_options={"num_blocks": 1, "stream_scale": False})
    for name, ours, size in (("short", short, 3), ("whole", whole, 8)):
        result = export_model(saved(ours, tmp_path / name), tmp_path / f"{name}_out", "kimi-k3")
        assert result["block_size"] == size
        with torch.no_grad():
            assert torch.allclose(load(tmp_path / f"{name}_out").eval()(IDS).logits, ours(IDS).logits, atol=1e-4)


def test_calls_that_cannot_be_are_refused(tmp_path, capsys):
    folder = saved(model("dense"), tmp_path / "native")
    for wanted in (tmp_path / "native", folder / "config.json"):
        assert main(["export", str(folder), str(wanted), "--to", "kimi-k3"]) == 2
        assert "exists already" in capsys.readouterr().err
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    assert main(["export", str(folder), str(tmp_path / "link"), "--to", "kimi-k3"]) == 2
    assert main(["export", str(folder), str(tmp_path / "out")]) == 2
    assert "TO is missing" in capsys.readouterr().err
    assert main(["export", str(folder), str(tmp_path / "out"), "--to", "onnx"]) == 2
    assert "--to must be one of kimi-k3, gguf" in capsys.readouterr().err
    assert main(["export", str(folder), str(tmp_path / "out"), "--to", "kimi-k3", "--outtype", "f16"]) == 2
    assert "outtype is of GGUF files" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "none"), str(tmp_path / "out"), "--to", "kimi-k3"]) == 2
    with pytest.raises(UsageError, match="to must be one of kimi-k3, gguf"):
        export_model(folder, tmp_path / "out", "safetensors")
    with pytest.raises(UsageError, match="outtype must be one of f32, f16, bf16, q8_0; it is 'q4'"):
        export_model(folder, tmp_path / "out", "gguf", outtype="q4")
    assert not (tmp_path / "out").exists()


def test_a_converted_model_is_refused(tmp_path):
    import transformers

    from attnres import hf

    sizes = dict(vocab_size=257, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    converted = hf.convert(transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)), num_blocks=2)
    with pytest.raises(UsageError, match="is a converted model"):
        export_model(saved(converted, tmp_path / "native"), tmp_path / "out", "kimi-k3")


def test_the_command_exports_a_run(server, corpus_file, tmp_path):
    shape = {"hidden-size": 32, "num-hidden-layers": 4, "num-attention-heads": 2, "kv-lora-rank": 16}
    flags = [word for name, value in shape.items() for word in (f"--model.{name}", value)]
    pattern = ["--model.attention-pattern", "kda", "mla", "--residual.block-size", 4]
    run = ["--data", corpus_file, "--steps", 2, "--context", 32, "--out", tmp_path / "run", "--device", "cpu"]
    assert server.run("train", *run, *flags, *pattern).status == 0
    ended = server.run("export", tmp_path / "run", tmp_path / "out", "--to", "kimi-k3")
    assert ended.status == 0 and "in 4 layers, blocks of 2, as kimi-k3" in ended.out, ended.err
    ours = attnres.run.open(tmp_path / "run", device="cpu").model
    with torch.no_grad():
        assert torch.allclose(load(tmp_path / "out").eval()(IDS).logits, ours(IDS), atol=5e-2)
    text = json.loads((tmp_path / "out/config.json").read_text())
    assert text["eos_token_id"] == 256 and (tmp_path / "out/generation_config.json").exists()


KILLED = """
import os, signal, sys
from attnres.export import export_model, kimi_k3, gguf_file
def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
kimi_k3._name_shards = die
gguf_file._write_tensor = die
export_model(sys.argv[1], sys.argv[2], sys.argv[3])
"""


@pytest.mark.parametrize("to", ["kimi-k3", "gguf"])
def test_a_killed_export_leaves_nothing_under_its_name(tmp_path, to):
    pytest.importorskip("gguf")
    folder = saved(model("dense"), tmp_path / "native")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", KILLED, folder, tmp_path / "out", to]
    assert subprocess.run(command, env=environment, capture_output=True).returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    export_model(folder, tmp_path / "out", to)
    assert (tmp_path / "out").exists()


def test_a_failed_export_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(kimi_k3, "_name_shards", full)
    folder = saved(model("dense"), tmp_path / "native")
    with pytest.raises(Failure, match=r"cannot write .*out: No space left on device"):
        export_model(folder, tmp_path / "out", "kimi-k3")
    assert [path.name for path in tmp_path.iterdir()] == ["native"]


def test_progress_is_said(tmp_path, monkeypatch):
    from attnres.export import door

    clock = iter(range(0, 1000))
    monkeypatch.setattr(door.time, "monotonic", lambda: next(clock))
    said = []
    export_model(saved(model("dense"), tmp_path / "native"), Path(tmp_path / "out"), "kimi-k3", report=said.append)
    assert said[0].startswith("writing layer 1 of 8") and said[-1] == "writing layer 8 of 8"
