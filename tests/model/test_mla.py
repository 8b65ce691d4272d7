"""Latent attention against its formula written out, in fp64; what it caches; and its two forms."""

import pytest
import torch

from attnres.model import DecoderConfig
from attnres.model.cache import KeyValueCache
from attnres.model.layers.gqa import Context
from attnres.model.layers.latent import MultiHeadLatentAttention

HEADS, RANK, OWN, SHARED, VALUE, WIDTH = 3, 7, 5, 4, 6, 12
EMPTY = torch.empty(0)


@pytest.fixture(scope="module", params=[{}, {"q_lora_rank": 3, "mla_use_output_gate": True}], ids=["plain", "k3"])
def layer(request):
    config = DecoderConfig(
        hidden_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        kv_lora_rank=RANK,
        qk_nope_head_dim=OWN,
        qk_rope_head_dim=SHARED,
        v_head_dim=VALUE,
        rms_norm_eps=1e-5,
        **request.param,
    )
    torch.manual_seed(0)
    built = MultiHeadLatentAttention(config, 0).double()
    torch.nn.init.normal_(built.kv_a_layernorm.weight)
    if request.param:
        torch.nn.init.normal_(built.q_a_layernorm.weight)
    return built


def inputs(tokens):
    return torch.randn(2, tokens, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(tokens))


def context(cache=None, new=1, **rest):
    past = 0 if cache is None else cache.get_seq_length()
    mask = torch.arange(past + new) <= torch.arange(past, past + new)[:, None] if past and new > 1 else None
    return Context(EMPTY, EMPTY, mask, cache, **rest)


def formula(layer, x):
    """One head at a time, with keys and values made token by token (baselines: MLA without positions)."""
    latent, shared = layer.kv_a_proj_with_mqa(x).split([RANK, SHARED], -1)
    latent = latent / (latent.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.kv_a_layernorm.weight
    lowered, expansion = x, getattr(layer, "q_b_proj", getattr(layer, "q_proj", None)).weight
    if layer.q_a_proj is not None:
        lowered = x @ layer.q_a_proj.weight.T
        lowered = lowered / (lowered.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.q_a_layernorm.weight
    heads = []
    for h in range(HEADS):
        expand = layer.kv_b_proj.weight[h * (OWN + VALUE) : (h + 1) * (OWN + VALUE)]
        keys = torch.cat([latent @ expand[:OWN].T, shared], -1)
        queries = lowered @ expansion[h * (OWN + SHARED) : (h + 1) * (OWN + SHARED)].T
        scores = queries @ keys.transpose(1, 2) / (OWN + SHARED) ** 0.5
        scores = scores.masked_fill(torch.ones_like(scores).triu(1) > 0, float("-inf"))
        heads.append(scores.softmax(-1) @ latent @ expand[OWN:].T)
    attended = torch.cat(heads, -1)
    if layer.g_proj is not None:
        attended = attended / (1 + (-(x @ layer.g_proj.weight.T)).exp())
    return attended @ layer.o_proj.weight.T


def test_it_is_the_formula_with_its_gradients(layer):
    x = inputs(6).requires_grad_()
    wanted = [x, *(p for name, p in layer.named_parameters() if not name.startswith("norm"))]
    for absorbed in (False, True):
        layer.absorbs = lambda new, tokens, absorbed=absorbed: absorbed
        found, expected = layer(x, context()), formula(layer, x)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
        pairs = (torch.autograd.grad(y.square().sum(), wanted) for y in (found, expected))
        torch.testing.assert_close(*pairs, rtol=1e-10, atol=1e-10)
    del layer.absorbs


@pytest.mark.parametrize("parts", [[1] * 7, [3, 1, 3], [5, 2]])
@pytest.mark.parametrize("absorb", [False, True])
def test_in_parts_with_the_cache_it_gives_the_same(layer, parts, absorb):
    x, cache = inputs(7), KeyValueCache()
    layer.absorbs = lambda new, tokens: new < tokens  # whenever anything is cached
    found = torch.cat([layer(part, context(cache, part.shape[1], absorb=absorb)) for part in x.split(parts, 1)], 1)
    del layer.absorbs
    torch.testing.assert_close(found, formula(layer, x), rtol=1e-10, atol=1e-10)


def test_what_tensor_parallelism_splits_is_there(layer):
    parameters = dict(layer.named_parameters())
    assert set(layer.split) <= set(parameters)
    by_heads = {name for name, p in parameters.items() if p.dim() == 2 and p.shape[0] % HEADS == 0 and p.shape[0] > 12}
    assert {name for name, dim in layer.split.items() if dim == 0} == by_heads
    roles = {name.split(".")[0]: layer.roles.get(name.split(".")[0], "value") for name in parameters}
    assert {name for name, role in roles.items() if role == "query_key"} == {
        name for name in roles if name in ("q_proj", "q_a_proj", "q_b_proj")
    }


def test_a_token_costs_its_latent_and_shared_key_whatever_the_heads(layer):
    cache = KeyValueCache()
    layer(inputs(7), context(cache, 7))
    assert sum(t.numel() for held in (cache.keys, cache.values) for t in held.values()) == 2 * 7 * (RANK + SHARED)


@pytest.mark.parametrize(("new", "tokens", "absorbed"), [(1, 1000, True), (170, 10**6, True), (171, 10**6, False)])
def test_the_absorbed_form_is_for_few_new_tokens(new, tokens, absorbed):
    """With the 48B model's sizes the crossing is at 512 x 256 / (2 x 512 - 256) = 170.7 new tokens."""
    sizes = dict(hidden_size=16, num_attention_heads=2, kv_lora_rank=512, qk_nope_head_dim=128, v_head_dim=128)
    with torch.device("meta"):
        layer = MultiHeadLatentAttention(DecoderConfig(**sizes), 0)
    assert layer.absorbs(new, tokens) == absorbed and not layer.absorbs(tokens, tokens)
