"""torchao's int8 weights: those of linear layers, and the residual connection's parameters as they are."""

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
pytest.importorskip("torchao", reason="torchao is not installed")
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from transformers import AutoModelForCausalLM, TorchAoConfig

from attnres import hf
from attnres.errors import UsageError

from .converted import PAD, build, tokens, with_moved_queries

NAMES = ["native", "llama", "qwen3"]
GREEDY = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": PAD, "eos_token_id": None}


def is_near(found, expected):
    """Each row of a matrix rounded to 127 steps of its largest element."""
    difference = (found - expected).norm() / expected.norm()
    assert 1e-4 < difference < 0.1, float(difference)


def quantised(model):
    """The paths of modules whose weight has eight bits."""
    return {name for name, module in model.named_modules() if "Int8" in type(getattr(module, "weight", None)).__name__}


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_linear_layers_alone_are_quantised(name):
    model = with_moved_queries(name)
    expected, before = model(tokens()).logits, model.model.residual.state_dict()
    linear = {path for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    quantize_(model, Int8WeightOnlyConfig())
    assert quantised(model) == linear and len(linear) == 3 * 7 + 1
    assert all(torch.equal(p, before[path]) for path, p in model.model.residual.named_parameters())
    is_near(model(tokens()).logits, expected)
    text = model.generate(tokens(), **GREEDY)
    assert torch.equal(model.generate(tokens(), **GREEDY, use_cache=False), text)


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_quantised_while_loading_and_saved(name, tmp_path):
    model = with_moved_queries(name)
    model.save_pretrained(tmp_path / "full")
    options = {"quantization_config": TorchAoConfig(Int8WeightOnlyConfig())}
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "full", **options)
    assert len(quantised(small)) == 3 * 7  # transformers leaves the head
    is_near(small(tokens()).logits, model(tokens()).logits)
    small.save_pretrained(tmp_path / "small")
    for loaded in (hf.load(tmp_path / "small"), AutoModelForCausalLM.from_pretrained(tmp_path / "small")):
        assert quantised(loaded) == quantised(small) and type(loaded) is type(model)
        assert torch.equal(loaded(tokens()).logits, small(tokens()).logits)


def test_what_is_quantised_is_not_converted():
    model = build("llama", torch.float32)
    quantize_(model, Int8WeightOnlyConfig())
    with pytest.raises(UsageError, match="quantised"):
        hf.convert(model)
