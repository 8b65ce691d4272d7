"""Models in a GGUF file: dequantised, converted, generated from, evaluated and inspected."""

import sys

import numpy as np
import pytest
import torch

from attnres import hf
from attnres.cli import main
from attnres.errors import UsageError
from attnres.hf.convert.door import load_pretrained
from attnres.hf.convert.folder import convert_folder
from attnres.run import opening

from .converted import VOCAB, build, tokens

gguf = pytest.importorskip("gguf")
LETTERS = ["<|endoftext|>", "<s>", "</s>", "AB", "CD", *(chr(i) for i in range(33, 33 + VOCAB - 5))]
NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm", "model.layers": "blk",
}  # fmt: skip


def write(model, path, kind=None):
    """A Llama as llama.cpp's files have it, its matrices quantised to `kind`."""
    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(VOCAB)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(LETTERS)
    writer.add_token_types([1] * VOCAB)
    writer.add_token_merges(["A B", "C D"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, parameter in model.state_dict().items():
        rows, place = parameter.float().numpy(), name
        for key, count in heads.items():
            if key in name:  # llama.cpp pairs neighbouring channels in its rotary embedding
                rows = rows.reshape(count, 2, -1, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)
        for key, short in NAMES.items():
            place = place.replace(key, short)
        if kind is not None and rows.ndim == 2 and rows.shape[1] % 32 == 0:
            writer.add_tensor(place, gguf.quants.quantize(np.ascontiguousarray(rows), kind), raw_dtype=kind)
        else:
            writer.add_tensor(place, np.ascontiguousarray(rows))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def original():
    return build("llama", torch.float32)


@torch.no_grad()
@pytest.mark.parametrize("kind", [None, "Q8_0"])
def test_a_file_is_converted_to_a_folder(original, tmp_path, kind):
    source = write(original, tmp_path / "tiny.gguf", kind and gguf.GGMLQuantizationType[kind])
    found = load_pretrained(source, dtype=torch.float32)
    expected = found(tokens()).logits
    assert torch.allclose(expected, original(tokens()).logits, atol=0.3 if kind else 1e-5)
    assert not hasattr(found.config, "quantization_config")
    result = convert_folder(source, tmp_path / "converted", num_blocks=3)
    assert result["relative_difference"] < 1e-5
    model = hf.load(tmp_path / "converted", dtype=torch.float32)
    assert torch.allclose(model(tokens()).logits, expected, atol=1e-4)
    opened = opening.open(tmp_path / "converted")
    assert opened.kind == "converted" and opened.tokenizer.decode(opened.tokenizer.encode("ABC")) == "ABC"


def test_a_file_is_opened_as_it_is(original, tmp_path, capsys):
    source = write(original, tmp_path / "tiny.gguf")
    opened = opening.open(source, pretrained=True)
    assert opened.kind == "pretrained" and not opened.model.training
    assert opened.tokenizer.decode(opened.tokenizer.encode("ABC")) == "ABC"
    text = tmp_path / "text.txt"
    text.write_text("ABCABC")
    assert main(["eval", str(source), "--data", str(text)]) == 0
    assert "perplexity" in capsys.readouterr().out
    with pytest.raises(UsageError, match="without Attention Residuals; convert it first"):
        opening.open(source)


def test_a_damaged_file_and_a_missing_package_are_said(original, tmp_path, monkeypatch):
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(b"GGUF" + bytes(20))
    with pytest.raises(UsageError, match=r"damaged\.gguf") as caught:
        convert_folder(damaged, tmp_path / "converted")
    assert "\n" not in str(caught.value) and not (tmp_path / "converted").exists()
    source = write(original, tmp_path / "tiny.gguf")
    monkeypatch.setattr(sys.modules["attnres.hf.gguf_file"], "is_gguf_available", lambda: False)
    with pytest.raises(UsageError, match="for which gguf is needed; run: pip install gguf"):
        load_pretrained(source)
