"""Models as GGUF files: every tensor, key and token in them."""

import json
import sys

import numpy as np
import pytest

from attnres.cli import main
from attnres.data.tokenizer import ByteTokenizer
from attnres.errors import UsageError
from attnres.export import export_model, gguf_file
from attnres.hf.kimi_k3.names import ATTENTION, FEED_FORWARD, OUTPUT_READ, OUTSIDE, READS

from .k3_models import model

gguf = pytest.importorskip("gguf")


def saved(ours, folder):
    ours.save_pretrained(folder)
    ByteTokenizer().save(folder)
    return folder


def read(path):
    """(tensors as numpy would have them, types by name, keys)."""
    reader = gguf.GGUFReader(path)
    found = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    types = {t.name: t.tensor_type.name for t in reader.tensors}
    return found, types, {name: field.contents() for name, field in reader.fields.items()}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    root = tmp_path_factory.mktemp("exported")
    ours = model("kimi_k3")
    folder = saved(ours, root / "native")
    for outtype in gguf_file.OUTTYPES:
        export_model(folder, root / f"{outtype}.gguf", "gguf", outtype=outtype)
    return ours, root


def test_tensors_are_as_llama_cpp_computes_with_them(exported):
    ours, root = exported
    found, _, _ = read(root / "f32.gguf")
    kda, mla, experts = (ours.model.layers[i].state_dict() for i in (0, 6, 3))
    query, key_norm = ours.model.residual.rows(3)
    keys, values = mla["kv_b_proj.weight"].unflatten(0, (4, -1)).split([32, 32], 1)
    expected = {
        "token_embd.weight": ours.model.embed_tokens.weight,
        "output.weight": ours.lm_head.weight,
        "blk.1.ffn_res_score.weight": query * key_norm,
        "blk.0.ssm_a": -kda["A_log"].exp(),
        "blk.0.ssm_dt.bias": kda["dt_bias"],
        "blk.0.ssm_conv1d_k.weight": kda["k_conv1d"][None, :, None],
        "blk.0.ssm_g.weight": kda["g_proj.weight"],
        "blk.3.attn_k_b.weight": keys.transpose(1, 2),
        "blk.3.attn_v_b.weight": values,
        "blk.3.attn_gate.weight": mla["g_proj.weight"],
        "blk.3.attn_q_a_norm.weight": mla["q_a_layernorm.weight"],
        "blk.1.ffn_down_exps.weight": experts["down_proj"],
        "blk.1.exp_probs_b.bias": experts["correction_bias"],
        "blk.1.ffn_routed_up.weight": experts["routed_expert_up_proj.weight"],
    }
    for name, tensor in expected.items():
        assert found[name].shape == tuple(tensor.shape), name
        assert np.array_equal(found[name], tensor.detach().numpy()), name


def test_every_tensor_is_in_the_table(exported):
    found, _, _ = read(exported[1] / "f32.gguf")
    rows = [row for kinds in (ATTENTION, FEED_FORWARD) for kind in kinds.values() for row in kind]
    known = {name for row in rows for name in row.gguf.split()} | {read.gguf for read in READS}
    outside = {row.gguf for row in OUTSIDE} | {OUTPUT_READ.gguf}
    for name in found:
        assert name in outside or (name.startswith("blk.") and name.split(".", 2)[2] in known), name
    assert outside <= set(found) and len(found) == 4 + 6 * 16 + 2 * 11 + 5 + 7 * 13


def test_types_and_what_they_lose(exported):
    root = exported[1]
    exact, _, _ = read(root / "f32.gguf")
    for outtype, number, error in (("f16", 1, 1e-3), ("bf16", 32, 8e-3), ("q8_0", 7, 2e-2)):
        found, types, keys = read(root / f"{outtype}.gguf")
        assert keys["general.file_type"] == number
        for name, kind in types.items():
            matrix = exact[name].ndim > 1 and not name.endswith(gguf_file.SINGLE)
            whole = outtype != "q8_0" or exact[name].shape[-1] % 32 == 0
            assert kind == ((outtype.upper() if whole else "F16") if matrix else "F32"), name
            assert np.abs(found[name] - exact[name]).max() <= error * np.abs(exact[name]).max() * matrix, name
        assert {"F32", outtype.upper()} <= set(types.values())
    assert types["blk.3.attn_q_b.weight"] == "F16"  # rows of 48


def test_keys(exported):
    _, _, keys = read(exported[1] / "f16.gguf")
    expected = {
        "general.architecture": "kimi-k3", "general.name": "f16", "kimi-k3.block_count": 8,
        "kimi-k3.context_length": 512, "kimi-k3.attention.head_count_kv": [0, 0, 0, 1] * 2,
        "kimi-k3.attention.key_length": 80, "kimi-k3.attention.value_length": 64,
        "kimi-k3.attention.key_length_mla": 48, "kimi-k3.attention.value_length_mla": 32,
        "kimi-k3.attention.q_lora_rank": 48, "kimi-k3.attn_res.block_size": 2, "kimi-k3.kda.head_dim": 32,
        "kimi-k3.kda.gate_lower_bound": -5.0, "kimi-k3.activation.situ_beta": 4.0,
        "kimi-k3.activation.situ_linear_beta": 25.0, "kimi-k3.expert_latent_length": 64, "kimi-k3.expert_count": 8,
        "kimi-k3.expert_used_count": 2, "kimi-k3.leading_dense_block_count": 1, "kimi-k3.expert_weights_norm": True,
        "kimi-k3.expert_gating_func": 2, "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.eos_token_id": 256, "tokenizer.ggml.add_bos_token": False,
    }  # fmt: skip
    assert {name: keys.get(name) for name in expected} == expected
    assert len(keys["tokenizer.ggml.tokens"]) == len(keys["tokenizer.ggml.token_type"]) == 512
    assert keys["tokenizer.ggml.token_type"][255:258] == [1, 3, 5]


def test_chat_template_and_ids(tmp_path):
    folder = saved(model("dense", eos_token_id=[7, 256], bos_token_id=3), tmp_path / "native")
    config = json.loads((folder / "tokenizer_config.json").read_text()) | {"chat_template": "{{ messages }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    export_model(folder, tmp_path / "out.gguf", "gguf")
    _, _, keys = read(tmp_path / "out.gguf")
    assert keys["tokenizer.chat_template"] == "{{ messages }}"
    assert (keys["tokenizer.ggml.eos_token_id"], keys["tokenizer.ggml.bos_token_id"]) == (7, 3)


def test_layers_of_one_kind_are_refused(tmp_path):
    for kind, missing in (("mla", "kda"), ("kda", "mla")):
        folder = saved(model("dense", attention_pattern=[kind]), tmp_path / kind)
        with pytest.raises(UsageError, match=f"the model has no {missing} layer; export --to kimi-k3"):
            export_model(folder, tmp_path / "out", "gguf")
        export_model(folder, tmp_path / f"{kind}_k3", "kimi-k3")


def test_a_missing_package_is_said(tmp_path, monkeypatch, capsys):
    folder = saved(model("dense"), tmp_path / "native")
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert main(["export", str(folder), str(tmp_path / "out"), "--to", "gguf"]) == 2
    assert "needs the package gguf; run: pip install 'gguf>=0.17'" in capsys.readouterr().err


def changed(fields, **values):
    return {**fields, **values}


REFUSED = {
    "is of the kind WordLevel": lambda f: changed(
        f, model={"type": "WordLevel", "vocab": {**f["model"]["vocab"]}, "unk_token": "!"}
    ),
    "has continuing_subword_prefix '##'": lambda f: changed(f, model={**f["model"], "continuing_subword_prefix": "##"}),
    r"normalises texts \(Lowercase\)": lambda f: changed(f, normalizer={"type": "Lowercase"}),
    r"has no name there \(Whitespace\)": lambda f: changed(f, pre_tokenizer={"type": "Whitespace"}),
    "cuts texts as gpt-2's does, but with ignore_merges": lambda f: changed(
        f, model={**f["model"], "ignore_merges": True}
    ),
    "has the token '<|endoftext|>' with lstrip": lambda f: changed(
        f, added_tokens=[{**f["added_tokens"][0], "lstrip": True}]
    ),
}


@pytest.mark.parametrize("said", REFUSED)
def test_a_tokenizer_that_llama_cpp_has_not_is_refused(tmp_path, said):
    folder = saved(model("dense"), tmp_path / "native")
    fields = REFUSED[said](json.loads(ByteTokenizer().to_json()))
    (folder / "tokenizer.json").write_text(json.dumps(fields))
    with pytest.raises(UsageError, match=said) as caught:
        export_model(folder, tmp_path / "out.gguf", "gguf")
    assert "\n" not in str(caught.value) and not (tmp_path / "out.gguf").exists()


def test_slices_are_the_whole(exported, tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_file, "SLICE", 1000)
    export_model(exported[1] / "native", tmp_path / "q8_0.gguf", "gguf", outtype="q8_0")
    assert (tmp_path / "q8_0.gguf").read_bytes() == (exported[1] / "q8_0.gguf").read_bytes()
