"""Every registered mechanism as a Hugging Face model."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from attnres import residual
from attnres.hf import AttnResConfig, AttnResForCausalLM
from attnres.hf.device_map import hidden_across_devices
from attnres.model.decoder import initial_std
from attnres.model.layers.gqa import Context, rotary_factors

SHAPE = dict(vocab_size=31, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
IDS = torch.randint(0, 31, (2, 7), generator=torch.Generator().manual_seed(0))
every = pytest.mark.parametrize("name", residual.names())


def model_of(name):
    torch.manual_seed(0)
    model = AttnResForCausalLM(AttnResConfig(**SHAPE, residual=name)).eval()
    for p in model.model.residual.parameters():
        p.data.add_(torch.randn_like(p), alpha=0.1)
    return model


@every
def test_saved_models_come_back(name, tmp_path):
    model = model_of(name)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, rtol=0, atol=0)
    torch.testing.assert_close(model.to_decoder()(IDS), model(IDS).logits)
    torch.testing.assert_close(AttnResForCausalLM.from_decoder(model.to_decoder())(IDS).logits, model(IDS).logits)


@every
def test_initial_values_are_the_mechanisms_own(name):
    torch.manual_seed(3)
    model = AttnResForCausalLM(AttnResConfig(**{**SHAPE, "hidden_size": 128, "intermediate_size": 256}, residual=name))
    fresh = residual.build(name, 128, 4)
    for (key, own), want in zip(model.model.residual.named_parameters(), fresh.parameters(), strict=True):
        assert own.shape == want.shape
        torch.testing.assert_close(own.mean(), want.mean(), rtol=0, atol=0.02, msg=key)
        torch.testing.assert_close(own.std(correction=0), want.std(correction=0), rtol=0.05, atol=1e-6, msg=key)
    for matrix in ("layers.0.o_proj", "layers.0.q_proj", "layers.1.up_proj"):
        std = model.model.get_submodule(matrix).weight.std().item()
        assert std == pytest.approx(initial_std(model.model, matrix), rel=0.05)


@every
def test_norms_called_apart_give_the_same_model(name):
    """As a model does that accelerate has spread over devices."""
    model = model_of(name).model.double()
    embedding = model.embed_tokens(IDS)
    cos, sin = rotary_factors(torch.arange(7)[None], 8, 10000.0)
    context = Context(cos, sin)
    want = model.hidden(embedding, context)
    torch.testing.assert_close(hidden_across_devices(model, embedding, context), want, rtol=1e-12, atol=1e-12)
