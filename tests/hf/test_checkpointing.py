"""Gradient checkpointing however it was turned on: before a conversion, with half the options, by a model around it."""

import copy

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM, LlavaConfig, LlavaForConditionalGeneration

from attnres import hf
from attnres.errors import UsageError

from .converted import SHAPE, build, move_queries, tokens

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated:FutureWarning")


def gradients(model):
    model.zero_grad()
    model(tokens(), labels=tokens(), use_cache=False).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same(found, expected):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.allclose(found[key], value, rtol=1e-6, atol=1e-9), key


def watched(layer):
    runs = []
    layer.register_forward_pre_hook(lambda *_: runs.append(1))
    return runs


@pytest.mark.parametrize("options", [None, {}, {"use_reentrant": False}, {"use_reentrant": True}])
def test_turned_on_before_the_conversion(options, caplog):
    model = build("llama").train()
    expected = gradients(move_queries(hf.convert(copy.deepcopy(model), num_blocks=3)))
    model.gradient_checkpointing_enable(options)
    move_queries(hf.convert(model, num_blocks=3))
    assert ("reentrant" in caplog.text) == bool(options and options["use_reentrant"])
    assert model.model.residual.lean and model.model.layers[1].gradient_checkpointing
    runs = watched(model.model.layers[1].mlp)
    same(gradients(model), expected)
    assert len(runs) == 2
    same(gradients(copy.deepcopy(model)), expected)
    model.gradient_checkpointing_disable()
    assert not model.model.residual.lean


def test_options_that_are_not_given_are_filled_in():
    model = move_queries(hf.convert(build("llama").train(), num_blocks=3))
    expected = gradients(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={})
    assert model.model.residual.lean
    same(gradients(model), expected)
    with pytest.raises(UsageError, match="use_reentrant"):
        model.gradient_checkpointing_enable({"use_reentrant": True})


def test_prepared_by_peft():
    peft = pytest.importorskip("peft")
    model = move_queries(hf.convert(build("llama", torch.float32).train(), num_blocks=3))
    model.is_loaded_in_8bit = True  # for which peft turns checkpointing on
    prepared = peft.prepare_model_for_kbit_training(model)
    adapted = peft.get_peft_model(prepared, peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["residual"]))
    assert model.model.residual.lean
    found = gradients(adapted)
    adapted.base_model.model.gradient_checkpointing_disable()
    expected = gradients(adapted)
    assert sum("pseudo_query" in name for name in expected) == 1
    for key, value in expected.items():
        assert torch.allclose(found[key], value, rtol=1e-4, atol=1e-6), key


def test_turned_on_by_a_model_around_it():
    text = build("llama", torch.float32).config
    vision = {"model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 8, "patch_size": 4, "projection_dim": 16}
    outer = LlavaForConditionalGeneration(LlavaConfig(text_config=text.to_dict(), vision_config=vision)).train()
    inner = hf.convert(outer.model.language_model)
    with pytest.raises(UsageError, match="use_reentrant"):
        outer.gradient_checkpointing_enable({"use_reentrant": True})
    outer.gradient_checkpointing_disable()
    expected = gradients(outer)
    outer.gradient_checkpointing_enable({})
    assert inner.residual.lean
    runs = watched(inner.layers[1].mlp)
    found = gradients(outer)
    assert len(runs) == 2 and found.keys() == expected.keys()


@pytest.mark.skipif(not hasattr(LlamaForCausalLM, "activation_checkpointing_enable"), reason="an older transformers")
def test_native_models_checkpoint_every_so_many_blocks():
    model = hf.AttnResForCausalLM(hf.AttnResConfig(**{**SHAPE, "num_hidden_layers": 4})).train()
    nn.init.normal_(model.model.residual.pseudo_query, std=0.1)
    expected = gradients(model)
    runs = [watched(layer) for layer in model.model.layers]
    model.activation_checkpointing_enable(every_n_layers=2)
    same(gradients(model), expected)
    assert [len(seen) for seen in runs] == [2, 2, 1, 1] * 2
    model.gradient_checkpointing_enable({"use_reentrant": True})
    same(gradients(model), expected)
    assert [len(seen) for seen in runs] == [4, 4, 3, 3] * 2
