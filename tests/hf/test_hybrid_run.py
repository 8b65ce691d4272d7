"""A training run of the hybrid architecture on every path that begins at its folder."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from attnres.commands import lab
from attnres.hf import AttnResForCausalLM
from attnres.model import Decoder, DecoderConfig


@pytest.fixture(scope="module")
def run(server, tiny, tmp_path_factory):
    """Two steps of the tiny preset, narrower, with a block of each kind."""
    out = tmp_path_factory.mktemp("hybrid")
    shape = ["--preset", "kimi-linear-tiny", "--model.attention-pattern", "kda", "mla", "--model.linear-chunk-size", 8]
    flags = ["--steps", 2, "--tokenizer", "train:270", "--residual.num-blocks", 2, "--optim.warmup-steps", 1]
    end = server.run("train", *shape, *tiny, *flags, "--out", out)
    assert end.status == 0, end.err
    return out


def test_weights_go_to_hugging_face_and_back(run, tmp_path):
    weights = load_file(run / "checkpoints" / "step-00000002" / "model.safetensors")
    config = DecoderConfig.from_dict(json.loads((run / "config.json").read_text())["model"])
    assert config.attention_kinds == ("kda", "mla") and config.has_experts(1) and not config.has_experts(0)
    decoder = Decoder(config).eval()
    decoder.load_state_dict(weights)
    model = AttnResForCausalLM.from_run(run).eval()
    ids = torch.randint(0, config.vocab_size, (2, 19), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, decoder(ids), rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(run).save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).to_decoder().state_dict()
    assert weights.keys() == again.keys()
    assert all(torch.equal(value, again[name]) for name, value in weights.items())


def test_commands_open_it(server, run, corpus_file, tmp_path):
    greedy = server.run("generate", run, "--prompt", "the source ", "--tokens", 5, "--temperature", 0)
    assert greedy.status == 0 and greedy.out.startswith("the source "), greedy.err
    (tmp_path / "some.txt").write_text(corpus_file.read_text()[:400])
    end = server.run("eval", run, "--data", tmp_path / "some.txt", "--context", 32, "--device", "cpu")
    assert end.status == 0 and "perplexity" in end.out, end.err
    page = tmp_path / "page.html"
    end = server.run("inspect", run, "--text", "the source attends", "--device", "cpu", "--out", page, "--no-per-read")
    assert end.status == 0 and page.exists(), end.err


def test_dynamics_takes_the_options_of_a_preset(monkeypatch):
    found = []
    monkeypatch.setattr(lab, "dynamics", lambda config, command: found.append(config))
    lab.run(["dynamics", "--preset", "kimi-linear-48b-a3b"])
    assert found[0].residual_options == {"prenorm": {}, "block_attnres": {"block_size": 6}, "full_attnres": {}}
    assert found[0].train.model.attention_kinds.count("mla") == 7
    lab.run(["dynamics", "--preset", "kimi-linear-48b-a3b", "--residual.num-blocks", "4"])
    assert found[1].residual_options["block_attnres"] == {"num_blocks": 4}
