"""torch.export of Hugging Face models, as docs/onnx.md does it: one program for prompts and cached steps."""

import pytest
import torch
from torch import nn
from torch.export import Dim, export

pytest.importorskip("transformers")
import attnres.hf
from attnres.hf import AttnResConfig, AttnResForCausalLM

from ..model.test_export import own_ops, snippets
from .converted import COMMON, VOCAB, build, move_queries

IDS = torch.randint(1, VOCAB, (3, 19), generator=torch.Generator().manual_seed(0))


def make(name, dtype=torch.float64, **options):
    if name == "llama":
        return move_queries(attnres.hf.convert(build(name, dtype), num_blocks=3))
    blocks = {"num_blocks": 3} if name == "block_attnres" else {}
    torch.manual_seed(0)
    config = AttnResConfig(**COMMON, initializer_range=0.2, residual=name, residual_options=blocks, **options)
    model = AttnResForCausalLM(config).to(dtype).eval()
    for parameter in model.model.residual.parameters():
        nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize("name", ["block_attnres", "full_attnres", "llama"])
def test_one_program_reads_a_prompt_and_makes_cached_steps(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = make(name)
    model.save_pretrained("upgraded-model")
    names: dict = {}
    exec(snippets()[0], names)
    assert names["model"].dtype == torch.float64 and not own_ops(names["program"])
    run = torch.export.load("model.pt2").module()
    none = [kept.new_empty(3, kept.shape[1], 0, kept.shape[3]) for kept in names["keys"]]
    logits, keys, values = [], none, none
    with torch.no_grad():
        for piece in IDS.split([6, 1, 1, 5, 6], 1):
            found, keys, values = run(piece, keys, values)
            logits.append(found)
        torch.testing.assert_close(torch.cat(logits, 1), model(IDS).logits, rtol=1e-9, atol=1e-9)
        assert run(IDS[:1, :1], *([kept[:1] for kept in side] for side in (keys, values)))[0].shape == (1, 1, VOCAB)


def test_a_model_with_windows_exports_without_a_cache():
    model = make("block_attnres", attention_pattern=("sliding_window", "gqa"), sliding_window=5)
    shapes = {"input_ids": {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}, "use_cache": None}
    program = export(model, (), {"input_ids": IDS[:2, :7].clone(), "use_cache": False}, dynamic_shapes=shapes)
    with torch.no_grad():
        found = program.module()(input_ids=IDS, use_cache=False).logits
        torch.testing.assert_close(found, model(IDS).logits, rtol=1e-9, atol=1e-9)
