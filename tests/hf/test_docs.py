"""Every snippet of docs/huggingface.md and docs/huggingface_more.md runs, in order, as a reader would run it."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch

from attnres.data.tokenizer import ByteTokenizer
from attnres.model import Decoder, DecoderConfig
from attnres.run import checkpoint

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("peft")
from transformers import LlamaConfig, LlamaForCausalLM

from .converted import with_moved_queries

DOCS = Path(__file__).parents[2] / "docs"
TEXT = "A residual connection is how information travels over depth.\n"


def snippets(page):
    text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


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

    names = {}
    found = snippets("huggingface")
    assert len(found) == 5
    for snippet in found:
        exec(compile(snippet, "docs/huggingface.md", "exec"), names)
        if "texts" in names:
            first, _ = names.pop("texts")
            assert "A residual connection is" in first
    assert "bits_per_byte" in capsys.readouterr().out
    data = names["results"]["data"]
    assert data["bytes"] == 8 * len(TEXT) and 0 < data["bits_per_byte"] < 9
    tuned = names["AutoModelForCausalLM"].from_pretrained("tuned-model").model
    assert tuned.residual.pseudo_query.any(), "what was trained beside the adapters is in the merged model"


@pytest.fixture
def as_torchrun_would(monkeypatch):
    """One process, with a group that is taken apart again."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated:FutureWarning")
@pytest.mark.parametrize("kind", ["native", "llama"])
def test_the_second_page_runs(kind, tmp_path, monkeypatch, as_torchrun_would):
    monkeypatch.chdir(tmp_path)
    sizes = {"vocab_size": 257, "pad_token_id": 256, "bos_token_id": 256, "eos_token_id": 256}
    with_moved_queries(kind, **sizes).save_pretrained("my-model")
    with_moved_queries("native", num_hidden_layers=1, **sizes).save_pretrained("small-model")
    ByteTokenizer().save(tmp_path / "my-model")
    Path("notes.txt").write_text(TEXT * 8)
    names = {}
    found = snippets("huggingface_more")
    assert len(found) == 8
    for snippet in found:
        packages = set(re.findall(r"^from (\w+)", snippet, re.MULTILINE))
        if all(importlib.util.find_spec(package) for package in packages):
            exec(compile(snippet, "docs/huggingface_more.md", "exec"), names)
    assert "trust_remote_code=True" in Path("portable-model/README.md").read_text()
    assert names["merged"].model.residual.pseudo_query.any()
    assert "FSDP" in type(names["model"].model.residual).__name__
