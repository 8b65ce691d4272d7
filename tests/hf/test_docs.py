"""Every snippet of docs/huggingface.md runs, in order, as a reader would run it."""

import json
import re
from pathlib import Path

import pytest

from attnres.data.tokenizer import ByteTokenizer
from attnres.model import Decoder, DecoderConfig
from attnres.run import checkpoint

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("peft")
from transformers import LlamaConfig, LlamaForCausalLM

PAGE = Path(__file__).parents[2] / "docs" / "huggingface.md"
TEXT = "A residual connection is how information travels over depth.\n"


def test_the_page_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = DecoderConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=256)
    run = tmp_path / "runs" / "small"
    ByteTokenizer().save(run)
    (run / "config.json").write_text(json.dumps({"model": config.to_dict()}))
    checkpoint.save(run / "checkpoints", 1, Decoder(config).state_dict(), {}, {}, keep=1)
    Path("notes.txt").write_text(TEXT * 8)
    base = LlamaConfig(vocab_size=257, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=2)
    LlamaForCausalLM(base).save_pretrained("base-model")

    snippets = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert len(snippets) == 5
    names = {}
    for snippet in snippets:
        exec(compile(snippet, str(PAGE), "exec"), names)
        if "texts" in names:
            first, _ = names.pop("texts")
            assert "A residual connection is" in first
    assert "bits_per_byte" in capsys.readouterr().out
    data = names["results"]["data"]
    assert data["bytes"] == 8 * len(TEXT) and 0 < data["bits_per_byte"] < 9
    tuned = names["AutoModelForCausalLM"].from_pretrained("tuned-model").model
    assert tuned.residual.pseudo_query.any(), "what was trained beside the adapters is in the merged model"
