"""Mixture of experts against a loop over tokens, its balancing, and that nothing is counted twice."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from attnres.errors import UsageError
from attnres.model.layers.activation import SILU, Activation
from attnres.model.layers.experts import MixtureOfExperts, grouped_experts, looped_experts
from attnres.model.layers.experts_cpu import token_experts

SITU = Activation(1.5, 0.8)
LATENT = {"latent_size": 5, "latent_norm": True, "activation": SITU}


def layer(dtype=torch.float64, **changes) -> MixtureOfExperts:
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_experts": 6, "experts_per_token": 2, "scaling": 2.446}
    built = MixtureOfExperts(**{**sizes, **changes}).to(dtype)
    if built.routed_expert_norm is not None:
        torch.nn.init.normal_(built.routed_expert_norm.weight)
    built.correction_bias.normal_(std=0.3)
    return built


def gated(activation: Activation, g: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """The formulas of SwiGLU and SiTU, written out."""
    b, c = activation
    a = b * (g / b).tanh() if b else g
    return a / (1 + (-g).exp()) * (c * (u / c).tanh() if c else u)


def naive(moe: MixtureOfExperts, x_BTD: torch.Tensor) -> torch.Tensor:
    """Every token alone, through each of its experts."""
    outputs = []
    for x in x_BTD.flatten(0, 1):
        score = torch.sigmoid(moe.router.weight @ x)
        chosen = torch.argsort(score.detach() + moe.correction_bias, descending=True)[: moe.experts_per_token].tolist()
        total = sum(score[e] for e in chosen) + 1e-20
        z = x if moe.routed_expert_down_proj is None else moe.routed_expert_down_proj.weight @ x
        y = torch.zeros_like(z)
        for e in chosen:
            inner = gated(moe.activation, moe.gate_proj[e] @ z, moe.up_proj[e] @ z)
            y = y + moe.scaling * score[e] / total * (moe.down_proj[e] @ inner)
        if moe.routed_expert_norm is not None:
            y = y / (y.square().mean() + 1e-6).sqrt() * moe.routed_expert_norm.weight
        if moe.routed_expert_up_proj is not None:
            y = moe.routed_expert_up_proj.weight @ y
        if (shared := moe.shared_experts) is not None:
            inner = gated(moe.activation, shared.gate_proj.weight @ x, shared.up_proj.weight @ x)
            y = y + shared.down_proj.weight @ inner
        outputs.append(y)
    return torch.stack(outputs).view(x_BTD.shape)


def gradients(moe, function, x):
    x = x.clone().requires_grad_()
    y = function(x)
    used = [p for name, p in moe.named_parameters() if name != "norm.weight"]
    return y, torch.autograd.grad((y * torch.linspace(-1, 2, y.numel()).to(y).view_as(y)).sum(), [x, *used])


@pytest.mark.parametrize(
    ("shape", "changes"),
    [
        ((2, 7), {}),
        ((1, 1), {}),  # four experts have no token
        ((3, 5), {"experts_per_token": 6}),
        ((3, 5), {"experts_per_token": 1, "num_shared_experts": 0}),
        ((2, 3), {"num_experts": 1, "experts_per_token": 1, "num_shared_experts": 3}),
        ((2, 7), {"activation": SITU}),
        ((2, 7), {"activation": Activation(4.0)}),
        ((2, 7), {"latent_size": 5, "num_shared_experts": 0}),
        ((2, 7), LATENT),
    ],
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_output_and_every_gradient_are_those_of_a_loop_over_tokens(shape, changes, dtype, tolerance):
    moe = layer(dtype, **changes)
    x = torch.randn(*shape, 8, dtype=dtype)
    (y, found), (expected, true) = gradients(moe, moe, x), gradients(moe, lambda x: naive(moe, x), x)
    torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)
    for a, b in zip(found, true, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_all_tokens_may_go_to_one_expert():
    moe = layer(experts_per_token=1)
    moe.correction_bias[4] = 10
    x = torch.randn(2, 9, 8, dtype=torch.float64)
    torch.testing.assert_close(moe(x), naive(moe, x), rtol=1e-12, atol=1e-12)
    moe(x).sum().backward()
    assert moe.load.tolist() == [0, 0, 0, 0, 18, 0]
    assert [g.abs().max().item() > 0 for g in moe.down_proj.grad] == [False] * 4 + [True, False]


@pytest.mark.parametrize("activation", [SITU, SILU])
def test_experts_one_after_the_other_are_those_on_the_cpu(activation):
    """What GPUs run and what CPUs run, and every gradient of both."""
    moe = layer(**{**LATENT, "activation": activation})
    other = layer(**{**LATENT, "activation": activation})
    other.exchange = lambda experts: experts
    x = torch.randn(2, 7, 8, dtype=torch.float64)
    (y, found), (expected, true) = gradients(other, other, x), gradients(moe, moe, x)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    for a, b in zip(found, true, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_situ_is_bounded_and_silu_in_the_limit():
    g, u = torch.linspace(-40, 40, 81, dtype=torch.float64), torch.linspace(90, -90, 81, dtype=torch.float64)
    h = Activation(4.0, 25.0)(g, u)
    assert h.abs().max() < 4 * 25 and h.abs().max() > 0.99 * 4 * 25
    torch.testing.assert_close(Activation(1e9)(g, u), F.silu(g) * u, rtol=1e-12, atol=1e-12)
    half = Activation(4.0, 25.0)(g.bfloat16(), u.bfloat16())
    assert half.dtype == torch.bfloat16 and (half - h).norm() < 0.01 * h.norm()


@pytest.mark.parametrize("activation", [SITU, SILU])
def test_both_forms_agree_where_experts_have_no_rows(activation):
    torch.manual_seed(0)
    shapes = ((9, 8), (5, 16, 8), (5, 16, 8), (5, 8, 16))
    tensors = [torch.randn(shape).bfloat16().requires_grad_() for shape in shapes]
    count = torch.tensor([0, 4, 0, 5, 0])
    y = grouped_experts(*tensors, count, activation)
    wide = looped_experts(*(tensor.double() for tensor in tensors), count, activation)
    factor = torch.randn(9, 8)
    found, true = (torch.autograd.grad((output * factor).sum(), tensors) for output in (y, wide))
    for a, b in zip((y, *found), (wide, *true), strict=True):
        assert (a - b).norm() < 0.02 * b.norm()
    assert not any(gradient[[0, 2, 4]].any() for gradient in found[1:])


def test_scores_are_fp32_under_autocast_and_outputs_are_not():
    moe = layer(torch.float32)
    x = torch.randn(2, 4, 8)
    with torch.autocast("cpu", torch.bfloat16):
        weight, _ = moe.route(x.bfloat16().flatten(0, 1))
        y = moe(x.bfloat16())
    assert weight.dtype == torch.float32 and y.dtype == torch.bfloat16
    torch.testing.assert_close(weight.sum(1), torch.full((8,), 2.446))
    torch.testing.assert_close(y.float(), moe(x), rtol=0.05, atol=0.05)


def test_the_bias_selects_and_weighs_nothing():
    moe = layer(experts_per_token=6)
    x = torch.randn(1, 4, 8, dtype=torch.float64)
    before = moe(x)
    moe.correction_bias += torch.arange(6)
    torch.testing.assert_close(moe(x), before)


def test_load_counts_each_trained_batch_once_also_where_activations_are_recomputed():
    plain, lean = layer(), layer()
    for _ in range(3):  # accumulation
        x = torch.randn(2, 7, 8, dtype=torch.float64, requires_grad=True)
        plain(x).sum().backward()
        checkpoint(lean, x, use_reentrant=False).sum().backward()
    assert plain.load.sum() == 3 * 14 * 2
    assert torch.equal(plain.load, lean.load)
    with torch.no_grad():
        plain(x)
    plain.eval()(x).sum().backward()
    assert torch.equal(plain.load, lean.load)


def test_the_bias_moves_towards_equal_load_and_keeps_mean_zero():
    moe = layer()
    moe.correction_bias.zero_()
    moe.load += torch.tensor([4, 1, 1, 1, 1, 4])
    moe.update_bias(0.3)
    assert moe.correction_bias.tolist() == pytest.approx([-0.4, 0.2, 0.2, 0.2, 0.2, -0.4])
    assert moe.load.sum() == 0
    moe.load += 5
    moe.update_bias(0.3)
    assert moe.correction_bias.tolist() == pytest.approx([-0.4, 0.2, 0.2, 0.2, 0.2, -0.4])


def test_balancing_spreads_a_lopsided_load():
    moe = layer(torch.float32, num_experts=8)
    moe.correction_bias.zero_()
    x = torch.randn(1, 256, 8) + torch.randn(8)
    loads = []
    for _ in range(150):
        moe(x).sum().backward()
        loads.append(moe.load.max().item() / 64)
        moe.update_bias(0.01)
    assert loads[0] > 2 and loads[-1] < 1.3


def test_bias_is_saved_and_load_is_not():
    names = layer().state_dict().keys()
    assert "correction_bias" in names and "load" not in names


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_bias_keeps_float32_when_the_model_goes_to_half_precision(dtype):
    moe = layer(torch.float32)
    bias = moe.correction_bias.clone()
    assert moe.to(dtype).router.weight.dtype == dtype
    assert moe.correction_bias.dtype == torch.float32 and torch.equal(moe.correction_bias, bias)
    assert torch.nn.Sequential(moe).to(dtype)[0].correction_bias is moe.correction_bias
    moe.load += torch.tensor([4, 0, 2, 2, 2, 2])
    moe.update_bias(rate=1e-3)
    assert not torch.equal(moe.correction_bias, bias)
    assert layer(dtype).correction_bias.dtype == torch.float32
    assert moe.double().correction_bias.dtype == torch.float64


def test_initial_values_cover_the_experts_with_the_scale_of_their_role():
    moe = layer(torch.float32, hidden_size=64, num_experts=16)
    draw = lambda: moe.initial_values({"value": 1.0, "output": 0.1}.get, torch.Generator().manual_seed(3), "cpu")  # noqa: E731
    values = dict(draw())
    assert values.keys() == {name for name, p in moe.named_parameters() if p.dim() == 3}
    assert {name: v.std().item() for name, v in values.items()} == pytest.approx(
        {"gate_proj": 1, "up_proj": 1, "down_proj": 0.1}, rel=0.05
    )
    assert all(torch.equal(value, values[name]) for name, value in draw())
    assert all(value.shape == getattr(moe, name).shape for name, value in values.items())


def test_latent_experts_have_the_output_role_where_they_lead_back_to_the_stream():
    moe = layer(torch.float32, hidden_size=64, num_experts=16, latent_size=48)
    values = dict(moe.initial_values({"value": 1.0, "output": 0.1}.get, torch.Generator(), "cpu"))
    assert values["down_proj"].std().item() == pytest.approx(1, rel=0.05)
    assert moe.roles["routed_expert_up_proj"] == "output" and "routed_expert_down_proj" not in moe.roles


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"latent_size": 0}, "latent_size must be a positive whole number; it is 0"),
        ({"experts_per_token": 7}, "experts_per_token must be at most num_experts; it is 7, and there are 6 experts"),
        ({"num_experts": 0}, "num_experts must be a positive whole number; it is 0"),
        ({"intermediate_size": 1.5}, "intermediate_size must be a positive whole number; it is 1.5"),
        ({"num_shared_experts": -1}, "num_shared_experts must be a whole number, zero or more; it is -1"),
        ({"scaling": 0.0}, "scaling must be a positive number; it is 0.0"),
    ],
)
def test_sizes_out_of_range_are_refused_in_one_sentence(changes, sentence):
    with pytest.raises(UsageError) as error:
        layer(**changes)
    assert str(error.value) == sentence


@pytest.mark.parametrize("activation", [SILU, SITU])
def test_the_form_for_cpus_has_the_gradients_of_its_function(activation):
    torch.manual_seed(0)
    token, count = torch.tensor([2, 0, 1, 4, 1]), torch.tensor([1, 0, 3, 1])
    shapes = ((5, 3), (5,), (4, 2, 3), (4, 2, 3), (4, 3, 2))
    tokens, weight, *matrices = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)

    def function(tokens, weight, *matrices):
        return token_experts(tokens, weight, token, count, *matrices, activation)

    assert not function(tokens, weight, *matrices)[3].any()
    torch.autograd.gradcheck(function, (tokens, weight, *matrices))
    torch.library.opcheck(
        torch.ops.attnres.token_experts.default,
        (tokens, weight, token, count, *matrices, *activation),
        test_utils="test_faketensor",
    )


@pytest.mark.parametrize("activation", [SILU, SITU])
def test_the_form_for_cpus_adds_up_half_precision_in_single(activation):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 24, "num_experts": 12, "experts_per_token": 10}
    moe = layer(torch.float32, **sizes, activation=activation)
    x = torch.randn(2, 16, 32)

    def found(autocast):
        moe.zero_grad()
        inputs = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = moe(inputs)
        y.float().square().mean().backward()
        return [y, inputs.grad, *(p.grad for name, p in moe.named_parameters() if name != "norm.weight")]

    for half, single in zip(found(True), found(False), strict=True):
        assert (half - single).norm() < 0.02 * single.norm()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("changes", [{}, LATENT])
def test_a_compiler_takes_the_layer_as_one_graph(training, changes):
    moe = layer(torch.float32, **changes).train(training)
    x = torch.randn(2, 5, 8)
    compiled = torch.compile(moe, backend="aot_eager", fullgraph=True)
    (y, found), (expected, true) = gradients(moe, compiled, x), gradients(moe, moe, x)
    for a, b in zip((y, *found), (expected, *true), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert moe.load.sum() == (2 * 2 * 10 if training else 0)
