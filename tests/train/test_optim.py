"""Who optimises which parameter, how the learning rate runs, and that the torch optimizers do what was asked."""

import itertools
import math

import pytest
import torch
from torch import nn

from attnres.errors import UsageError
from attnres.model import Decoder, DecoderConfig
from attnres.model.layers.experts import MixtureOfExperts
from attnres.residual import build
from attnres.run.optim_config import OptimConfig, learning_rate
from attnres.train.optim import build_optimizer, parameter_groups


def decoder(**changes) -> Decoder:
    shape = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return Decoder(DecoderConfig(**{**shape, "residual": "block_attnres", **changes}))


def routing(model: nn.Module, config: OptimConfig) -> dict[str, tuple[str, float]]:
    """Parameter name -> (optimizer, weight decay)."""
    entries = [
        (name, (group["optimizer"], group["weight_decay"]))
        for group in parameter_groups(model, config)
        for name, _ in group["params"]
    ]
    assert len(entries) == len(dict(entries)), "a parameter is in two groups"
    return dict(entries)


class Odd(nn.Module):
    """Every kind of parameter that must not go to Muon, beside one linear layer that must."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(8, 4)
        self.hidden = nn.Linear(4, 6)
        self.to_scalar = nn.Linear(4, 1)
        self.conv = nn.Conv1d(4, 4, 3)
        self.gate = nn.Parameter(torch.ones(4, 6))
        self.norm = nn.LayerNorm(4)
        self.skip = build("full_attnres", 4, 2)
        self.skip.projection = nn.Linear(4, 4)
        self.lm_head = nn.Linear(4, 8)


def test_muon_takes_the_hidden_matrices_and_nothing_else():
    routes = routing(decoder(tie_word_embeddings=False), OptimConfig(optimizer="muon", weight_decay=0.3))
    muon = {name for name, (owner, _) in routes.items() if owner == "muon"}
    assert muon == {name for name in routes if "_proj." in name}
    decayed = {name for name, (_, decay) in routes.items() if decay}
    assert decayed == muon | {"embed_tokens.weight", "lm_head.weight"}
    assert {routes[name][1] for name in decayed} == {0.3}
    assert routes["residual.pseudo_query"] == routes["residual.key_norm"] == ("adamw", 0.0)


@pytest.mark.parametrize("wrap", [lambda model: model, lambda model: nn.ModuleDict({"inner": model})])
def test_what_is_no_hidden_matrix_stays_with_adamw(wrap):
    model = wrap(Odd())
    routes = routing(model, OptimConfig(optimizer="muon", weight_decay=0.3))
    assert len(routes) == len(list(model.parameters()))
    short = {name.removeprefix("inner."): route for name, route in routes.items()}
    assert {name for name, (owner, _) in short.items() if owner == "muon"} == {"hidden.weight"}
    decayed = {"table.weight", "hidden.weight", "to_scalar.weight", "lm_head.weight"}
    assert {name for name, (_, decay) in short.items() if decay} == decayed


def test_adamw_keeps_the_same_weight_decay_and_takes_all():
    model = decoder()
    with_muon, without = (routing(model, OptimConfig(optimizer=name)) for name in ("muon", "adamw"))
    assert {owner for owner, _ in without.values()} == {"adamw"}
    assert {n: decay for n, (_, decay) in without.items()} == {n: decay for n, (_, decay) in with_muon.items()}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_tied_embeddings_are_optimised_once_as_an_embedding(optimizer):
    routes = routing(decoder(tie_word_embeddings=True), OptimConfig(optimizer=optimizer))
    assert routes["embed_tokens.weight"] == ("adamw", 0.1)
    assert "lm_head.weight" not in routes


def test_a_head_of_any_name_that_is_tied_to_an_embedding_is_one():
    model = nn.ModuleDict({"table": nn.Embedding(8, 4), "output": nn.Linear(4, 8, bias=False)})
    model["output"].weight = model["table"].weight
    assert routing(model, OptimConfig(optimizer="muon")) == {"table.weight": ("adamw", 0.1)}


def test_frozen_parameters_are_left_out():
    model = decoder()
    model.requires_grad_(False)
    with pytest.raises(UsageError, match="no trainable parameters"):
        parameter_groups(model, OptimConfig())
    model.residual.requires_grad_(True)
    assert set(routing(model, OptimConfig(optimizer="muon"))) == {"residual.pseudo_query", "residual.key_norm"}
    assert set(build_optimizer(model, OptimConfig(optimizer="muon")).by_name) == {"adamw"}


def test_warmup_is_linear_and_ends_at_the_full_rate():
    config = OptimConfig(lr=2.0, warmup_steps=4, schedule="constant")
    assert [learning_rate(step, 100, config) for step in (0, 1, 2, 3, 4, 99)] == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]


def test_cosine_runs_from_the_full_to_the_final_rate():
    config = OptimConfig(lr=2.0, warmup_steps=10, final_lr_fraction=0.25)
    rates = [learning_rate(step, 110, config) for step in range(10, 111)]
    assert rates[0] == 2.0
    assert rates[25] == pytest.approx(0.5 + 1.5 * (1 + math.cos(math.pi / 4)) / 2)
    assert rates[50] == pytest.approx(1.25)
    assert rates[100] == pytest.approx(0.5)
    assert all(later < earlier for earlier, later in itertools.pairwise(rates))
    assert learning_rate(200, 110, config) == pytest.approx(0.5)


def test_wsd_stays_until_the_last_part_and_falls_linearly():
    config = OptimConfig(lr=1.0, schedule="wsd", warmup_steps=10, decay_fraction=0.2, final_lr_fraction=0.2)
    assert {learning_rate(step, 100, config) for step in range(9, 81)} == {1.0}
    falling = [learning_rate(step, 100, config) for step in (85, 90, 95, 100, 150)]
    assert falling == pytest.approx([0.8, 0.6, 0.4, 0.2, 0.2])


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
@pytest.mark.parametrize("total_steps", [1, 2, 7, 50, 5000])
def test_every_step_of_any_run_has_a_positive_rate_no_higher_than_lr(schedule, total_steps):
    config = OptimConfig(lr=1.0, schedule=schedule, final_lr_fraction=0.0)
    rates = [learning_rate(step, total_steps, config) for step in range(total_steps)]
    assert all(0 < rate <= 1 for rate in rates)
    assert max(rates) == 1.0
    warmup = sum(later > earlier for earlier, later in itertools.pairwise(rates)) + 1
    assert warmup == max(1, min(100, total_steps // 10))


def test_a_warmup_as_long_as_the_run_is_refused():
    assert learning_rate(0, 5, OptimConfig(lr=1.0, warmup_steps=4)) == 0.25
    with pytest.raises(UsageError, match="warmup_steps must be fewer than the 5 steps"):
        learning_rate(0, 5, OptimConfig(warmup_steps=5))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("lr", value) for value in (0.0, -1.0, math.nan, math.inf, None)],
        *[("muon_lr", value) for value in (0.0, math.inf)],
        *[("betas", value) for value in ((0.9,), (0.9, 1.0), (-0.1, 0.9), 0.9)],
        *[("weight_decay", value) for value in (-0.1, math.nan, math.inf)],
        *[("warmup_steps", value) for value in (-1, 1.5)],
        *[("final_lr_fraction", value) for value in (-0.1, 1.1)],
        *[("decay_fraction", value) for value in (0.0, 1.1)],
        *[("clip", value) for value in (0.0, -1.0, math.inf)],
        ("eps", 0.0),
        ("optimizer", "sgd"),
        ("schedule", "linear"),
    ],
)
def test_a_value_out_of_range_is_a_usage_error_that_names_the_field(field, value):
    with pytest.raises(UsageError, match=rf"^{field} must be .*; it is "):
        OptimConfig(**{"optimizer": "muon", field: value})


def test_a_muon_rate_without_muon_is_refused():
    with pytest.raises(UsageError, match="muon_lr"):
        OptimConfig(muon_lr=0.01)


def test_a_configuration_from_json_equals_the_original():
    assert OptimConfig(betas=[0.8, 0.9]) == OptimConfig(betas=(0.8, 0.9))  # type: ignore[arg-type]


def test_rates_are_set_for_both_optimizers():
    optimizer = build_optimizer(decoder(), OptimConfig(optimizer="muon", lr=1.0, muon_lr=3.0, warmup_steps=4))
    assert optimizer.set_learning_rate(0, 100) == 0.25
    assert {group["optimizer"]: group["lr"] for group in optimizer.param_groups} == {"adamw": 0.25, "muon": 0.75}
    assert optimizer.set_learning_rate(3, 100) == 1.0  # not a fraction of the last rate
    assert {group["optimizer"]: group["lr"] for group in optimizer.param_groups} == {"adamw": 1.0, "muon": 3.0}


def test_muon_has_the_rate_of_adamw_by_default():
    optimizer = build_optimizer(decoder(), OptimConfig(optimizer="muon", lr=0.5))
    assert {group["lr"] for group in optimizer.param_groups} == {0.5}


def test_adamw_steps_as_its_definition_says():
    torch.manual_seed(0)
    layer = nn.Linear(3, 3)
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    config = OptimConfig(lr=0.1, betas=(0.5, 0.8), eps=1e-3, weight_decay=0.2, schedule="constant", warmup_steps=0)
    optimizer = build_optimizer(layer, config)
    grads = [torch.randn(3, 3), torch.randn(3)]
    layer.weight.grad, layer.bias.grad = (grad.clone() for grad in grads)
    optimizer.step()
    # after bias correction the first step's mean is the gradient and its mean square the gradient squared
    expected = weight * (1 - 0.1 * 0.2) - 0.1 * grads[0] / (grads[0].abs() + 1e-3)
    torch.testing.assert_close(layer.weight.detach(), expected)
    torch.testing.assert_close(layer.bias.detach(), bias - 0.1 * grads[1] / (grads[1].abs() + 1e-3))


def test_the_update_of_muon_is_orthogonal_and_as_large_as_that_of_adamw():
    torch.manual_seed(0)
    layer = nn.Linear(64, 16, bias=False)
    before = layer.weight.detach().clone()
    optimizer = build_optimizer(layer, OptimConfig(optimizer="muon", lr=0.1, weight_decay=0.5))
    layer.weight.grad = torch.randn(16, 64) @ torch.diag(torch.logspace(-1, 1, 64))
    optimizer.step()
    update = (before * (1 - 0.1 * 0.5) - layer.weight.detach()) / 0.1
    singular = torch.linalg.svdvals(update) / (0.2 * math.sqrt(64))
    assert singular.min() > 0.5 and singular.max() < 1.5  # five Newton-Schulz steps bring them near one, not to it
    assert update.square().mean().sqrt().item() == pytest.approx(0.2, rel=0.3)


def test_zero_grad_forgets_the_gradients_of_both_optimizers():
    model = decoder()
    optimizer = build_optimizer(model, OptimConfig(optimizer="muon"))
    model(torch.arange(8)[None]).sum().backward()
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(("clip", "expected"), [(1.0, 1.0), (100.0, 5.0), (None, 5.0)])
def test_gradients_are_clipped_over_all_parameters_together(clip, expected):
    model = Odd()
    optimizer = build_optimizer(model, OptimConfig(optimizer="muon", clip=clip))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    model.hidden.weight.grad[0, 0], model.norm.bias.grad[0] = 3.0, 4.0  # one with Muon, one with AdamW
    assert optimizer.clip_gradients().item() == pytest.approx(5.0)
    norms = [parameter.grad.norm() for parameter in model.parameters()]
    assert torch.stack(norms).norm().item() == pytest.approx(expected)


def train(model: nn.Module, optimizer, steps: range) -> None:
    for step in steps:
        tokens = torch.randint(32, (2, 8), generator=torch.Generator().manual_seed(step))
        optimizer.set_learning_rate(step, 8)
        logits = model(tokens)
        nn.functional.cross_entropy(logits.flatten(0, 1), tokens.roll(-1, 1).flatten()).backward()
        optimizer.clip_gradients()
        optimizer.step()
        optimizer.zero_grad()


def test_loaded_state_keeps_the_rates_and_decays_of_the_configuration():
    model = decoder()
    optimizer = build_optimizer(model, OptimConfig())
    train(model, optimizer, range(2))
    resumed = build_optimizer(model, OptimConfig(lr=0.7, weight_decay=0.9, betas=(0.1, 0.2)))
    resumed.load_state_dict(optimizer.state_dict())
    assert {group["weight_decay"] for group in resumed.param_groups} == {0.9, 0.0}
    assert {(group["lr"], group["betas"]) for group in resumed.param_groups} == {(0.7, (0.1, 0.2))}
    assert resumed.state_dict()["adamw"]["embed_tokens.weight"]["step"] == 2


def test_state_belongs_to_parameters_by_name_not_by_order():
    model = decoder()
    optimizer = build_optimizer(model, OptimConfig(optimizer="muon"))
    train(model, optimizer, range(1))
    saved = {
        name: {parameter: dict(state) for parameter, state in reversed(states.items())}
        for name, states in optimizer.state_dict().items()
    }
    resumed = build_optimizer(model, OptimConfig(optimizer="muon"))
    resumed.load_state_dict(saved)
    for name, parameters in saved.items():
        for parameter, state in parameters.items():
            for key, value in state.items():
                assert torch.equal(resumed.state_dict()[name][parameter][key], value)


def test_state_of_another_model_or_optimizer_is_refused():
    optimizer = build_optimizer(decoder(), OptimConfig())
    with pytest.raises(UsageError, match=r"adamw has residual\.key_norm in the saved state only \(2 such"):
        build_optimizer(decoder(residual="prenorm"), OptimConfig()).load_state_dict(optimizer.state_dict())
    with pytest.raises(UsageError, match=r"in the saved state only .* the optimizer of the checkpoint"):
        build_optimizer(decoder(), OptimConfig(optimizer="muon")).load_state_dict(optimizer.state_dict())


def test_state_from_before_the_first_step_is_loaded():
    model = decoder()
    optimizer = build_optimizer(model, OptimConfig(optimizer="muon"))
    optimizer.load_state_dict(build_optimizer(model, OptimConfig(optimizer="muon")).state_dict())
    train(model, optimizer, range(1))


def mixture() -> MixtureOfExperts:
    torch.manual_seed(0)
    return MixtureOfExperts(hidden_size=12, intermediate_size=20, num_experts=4, experts_per_token=2)


def test_experts_are_batches_of_matrices_for_muon():
    routes = routing(mixture(), OptimConfig(optimizer="muon", weight_decay=0.3))
    assert {name for name, route in routes.items() if route == ("expert_muon", 0.3)} == {
        "gate_proj",
        "up_proj",
        "down_proj",
    }
    assert routes["router.weight"] == routes["shared_experts.gate_proj.weight"] == ("muon", 0.3)
    assert routes["norm.weight"] == ("adamw", 0.0)


def test_muon_updates_each_expert_as_torch_does_a_matrix_alone():
    moe = mixture()
    alone = {
        (name, e): nn.Parameter(getattr(moe, name)[e].detach().clone())
        for name in ("gate_proj", "up_proj", "down_proj")
        for e in range(4)
    }
    ours = build_optimizer(moe, OptimConfig(optimizer="muon", lr=0.1, weight_decay=0.5))
    theirs = torch.optim.Muon(alone.values(), lr=0.1, weight_decay=0.5, adjust_lr_fn="match_rms_adamw")
    for step in range(3):
        moe(torch.randn(2, 3, 12)).square().sum().backward()  # an expert may have no token, and a zero gradient
        moe.down_proj.grad[3] *= 1000  # each matrix has a norm of its own
        for (name, e), parameter in alone.items():
            parameter.grad = getattr(moe, name).grad[e].clone()
        ours.step()
        theirs.step()
        ours.zero_grad()
        for (name, e), parameter in alone.items():
            torch.testing.assert_close(
                getattr(moe, name)[e].detach(), parameter.detach(), rtol=0, atol=2e-3 * (step + 1)
            )


def test_state_of_experts_is_saved_by_name():
    moe = mixture()
    optimizer = build_optimizer(moe, OptimConfig(optimizer="muon"))
    moe(torch.randn(2, 3, 12)).sum().backward()
    optimizer.step()
    state = optimizer.state_dict()
    assert state["expert_muon"]["gate_proj"]["momentum_buffer"].shape == (4, 20, 12)
    resumed = build_optimizer(moe, OptimConfig(optimizer="muon"))
    resumed.load_state_dict(state)
    found = resumed.state_dict()["expert_muon"]["up_proj"]["momentum_buffer"]
    assert torch.equal(found, state["expert_muon"]["up_proj"]["momentum_buffer"])
