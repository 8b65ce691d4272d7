"""Linear layers in whose place something else stands (adapters, quantisers, hooks): no model may read their weights
past it. The right values are those of the same model with the change merged into its weights."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from attnres.model import Decoder, DecoderConfig
from attnres.model.cache import KeyValueCache
from attnres.model.layers.experts import MixtureOfExperts
from attnres.model.layers.linear import bare_weight, linear_in

SHAPE = dict(
    vocab_size=41,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=24,
    linear_chunk_size=4,
    initializer_range=0.2,
    tie_word_embeddings=False,
    residual_options={"num_blocks": 2},
)
EXPERTS = dict(num_experts=6, num_experts_per_tok=2, first_k_dense_replace=1)
KINDS = [
    {"attention_pattern": ("gqa",)},
    {"attention_pattern": ("mla",)},
    {"attention_pattern": ("kda",)},
    {"attention_pattern": ("kda", "mla"), **EXPERTS},
]
IDS = torch.randint(0, 41, (2, 11), generator=torch.Generator().manual_seed(0))


class Adapted(nn.Module):
    """x W^T + x A^T B^T, without a `weight` that anyone could read."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        generator = torch.Generator().manual_seed(base.in_features)
        like = dict(dtype=base.weight.dtype, generator=generator)
        self.down = nn.Parameter(torch.randn(2, base.in_features, **like) / 8)
        self.up = nn.Parameter(torch.randn(base.out_features, 2, **like) / 8)

    def forward(self, x):
        return self.base(x) + x @ self.down.T @ self.up.T


def decoder(changes):
    model = Decoder(DecoderConfig(**{**SHAPE, **changes}), seed=3).double()
    for parameter in model.residual.parameters():
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    return model


def linear_names(model):
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def adapted(model):
    """A copy with every linear layer behind an adapter."""
    model = copy.deepcopy(model)
    for name in linear_names(model):
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, Adapted(model.get_submodule(name)))
    return model


def in_parts(model):
    cache = KeyValueCache()
    return torch.cat([model(part, cache) for part in IDS.split([4, 1, 1, 5], 1)], 1)


@pytest.mark.parametrize("changes", KINDS, ids=lambda c: "-".join(c["attention_pattern"]))
def test_what_stands_in_a_linear_layers_place_is_called(changes):
    plain = decoder(changes)
    model = adapted(plain)
    merged = {
        f"{name}.weight": model.get_submodule(name).base.weight
        + model.get_submodule(name).up @ model.get_submodule(name).down
        for name in linear_names(plain)
    }
    want, found = functional_call(plain, merged, (IDS,)), model(IDS)
    torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-10)
    with torch.no_grad():
        torch.testing.assert_close(in_parts(model), want, rtol=1e-10, atol=1e-10)
    leaves = [p for name in linear_names(plain) for p in model.get_submodule(name).parameters()]
    gradients = [torch.autograd.grad(F.cross_entropy(y.flatten(0, 1), IDS.flatten()), leaves) for y in (found, want)]
    torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-10)
    assert all(gradient.any() for gradient in gradients[0])


@torch.no_grad()
@pytest.mark.parametrize("changes", KINDS, ids=lambda c: "-".join(c["attention_pattern"]))
def test_a_hook_on_a_linear_layer_sees_every_pass(changes):
    model, calls = decoder(changes), []
    for name in linear_names(model):
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: calls.append(name))
    in_parts(model)
    assert {name: calls.count(name) for name in linear_names(model)} == dict.fromkeys(linear_names(model), 4)


@pytest.mark.parametrize("changes", KINDS, ids=lambda c: "-".join(c["attention_pattern"]))
def test_lora_is_the_same_function_unmerged_merged_and_unloaded(changes):
    peft = pytest.importorskip("peft")
    plain = decoder(changes)
    targets = sorted({name.rpartition(".")[2] for name in linear_names(plain)} - {"lm_head"})
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=targets)
    model = peft.inject_adapter_in_model(config, copy.deepcopy(plain)).double().eval()
    lora = {name: p for name, p in model.named_parameters() if "lora_" in name}
    for i, parameter in enumerate(lora.values()):
        nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(i))
    layers = [module for module in model.modules() if isinstance(module, peft.tuners.lora.LoraLayer)]
    assert len(layers) == len(linear_names(plain)) - 1

    found = model(IDS)
    gradients = torch.autograd.grad(F.cross_entropy(found.flatten(0, 1), IDS.flatten()), list(lora.values()))
    assert all(gradient.any() for gradient in gradients)
    assert not torch.allclose(found, plain(IDS), atol=0.1)
    with torch.no_grad():
        unmerged = in_parts(model)
        for layer in layers:
            layer.merge()
        merged, merged_in_parts = model(IDS), in_parts(model)
        weights = {name: model.get_submodule(name).get_base_layer().weight for name in linear_names(plain)[:-1]}
        unloaded = functional_call(plain, {f"{name}.weight": weight for name, weight in weights.items()}, (IDS,))
    for other in (unmerged, merged, merged_in_parts, unloaded):
        torch.testing.assert_close(other, found, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_adapter_leaves_the_router_its_precision(dtype):
    torch.manual_seed(0)
    sizes = dict(hidden_size=64, intermediate_size=8, num_experts=32, experts_per_token=4)
    layer, x = MixtureOfExperts(**sizes).to(dtype), torch.randn(50, 64, dtype=dtype)
    weights, experts = layer.route(x)
    layer.router = Adapted(layer.router)
    nn.init.zeros_(layer.router.up)
    found = layer.route(x)
    assert torch.equal(found[1], experts) and torch.equal(found[0], weights)
    assert layer.router.up.dtype == dtype, "the parameters are as they were"


def test_only_an_ordinary_layer_has_a_bare_weight():
    layer = nn.Linear(3, 2, bias=False)
    assert bare_weight(layer) is layer.weight
    with torch.no_grad():
        torch.testing.assert_close(
            linear_in(torch.float64, layer, torch.ones(1, 3)), layer.weight.double().sum(1)[None]
        )
    handle = layer.register_full_backward_pre_hook(lambda *_: None)
    assert bare_weight(layer) is None
    handle.remove()
    assert bare_weight(layer) is layer.weight
    layer.forward = lambda x: x
    assert bare_weight(layer) is None
    assert bare_weight(nn.Linear(3, 2)) is None, "there is a bias"
    assert bare_weight(nn.utils.parametrizations.weight_norm(nn.Linear(3, 2, bias=False))) is None


def test_a_quantised_layer_computes_in_its_own_dtype():
    class Quantised(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([[2, -3]], dtype=torch.int8), requires_grad=False)
            self.scale = nn.Parameter(torch.tensor(0.5, dtype=torch.bfloat16))

        def forward(self, x):
            assert x.dtype == torch.bfloat16 and self.scale.dtype == torch.bfloat16
            return x @ (self.weight * self.scale).T

    found = linear_in(torch.float32, Quantised(), torch.tensor([[1.0, 2.0]], dtype=torch.bfloat16))
    assert found.dtype == torch.float32 and found.item() == -2
