"""Groups of parameters for an optimizer, and what transformers' Trainer makes of them."""

import pytest
import torch

from attnres import hf
from attnres.errors import UsageError

from .converted import COMMON, build


def named(model, groups):
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {(group["lr"], group["weight_decay"]): {names[p] for p in group["params"]} for group in groups}


@pytest.mark.parametrize("model", ["converted", "native"])
def test_matrices_decay_and_the_residual_connection_has_its_rate(model):
    sizes = {key: value for key, value in COMMON.items() if key != "pad_token_id"}
    model = hf.convert(build("llama")) if model == "converted" else hf.AttnResForCausalLM(hf.AttnResConfig(**sizes))
    found = named(model, hf.parameter_groups(model, 1e-3, 0.1, query_lr=5e-3))
    assert set(found) == {(1e-3, 0.1), (1e-3, 0.0), (5e-3, 0.0)}
    assert {name.rpartition(".")[2] for name in found[5e-3, 0.0]} == {"pseudo_query", "key_norm"}
    assert all("norm" in name for name in found[1e-3, 0.0])
    assert sum(map(len, found.values())) == len(list(model.parameters()))
    torch.optim.AdamW(hf.parameter_groups(model, 1e-3, 0.1)).step()
    assert set(named(model, hf.parameter_groups(model, 1e-3, 0.1))) == {(1e-3, 0.1), (1e-3, 0.0)}


def test_frozen_parameters_are_left_out():
    model = hf.convert(build("llama")).requires_grad_(False)
    with pytest.raises(UsageError, match="no trainable parameters"):
        hf.parameter_groups(model, 1e-3, 0.1)
    model.model.residual.requires_grad_(True)
    (group,) = hf.parameter_groups(model, 1e-3, 0.1)
    assert group["weight_decay"] == 0 and len(group["params"]) == 2


@pytest.mark.parametrize("options", [{"lr": -1.0}, {"weight_decay": -0.1}, {"query_lr": float("nan")}])
def test_bad_numbers(options):
    (name,) = options
    with pytest.raises(UsageError, match=f"{name} must be zero or positive"):
        hf.parameter_groups(torch.nn.Linear(2, 2), **{"lr": 1e-3, "weight_decay": 0.1, **options})


def test_trainer_gives_queries_no_weight_decay(tmp_path):
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    model = hf.convert(build("llama", torch.float32))
    arguments = TrainingArguments(tmp_path, weight_decay=0.1, report_to=[], use_cpu=True)
    optimizer = Trainer(model=model, args=arguments).create_optimizer()
    names = {parameter: name for name, parameter in model.named_parameters()}
    decay = {names[p]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decay["model.residual.pseudo_query"] == decay["model.residual.key_norm"] == 0
    assert decay["model.layers.0.self_attn.q_proj.weight"] == 0.1
