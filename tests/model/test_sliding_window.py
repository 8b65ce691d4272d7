"""Sliding-window attention: a kind of layer in one file, and all that the rest of the house does with such a kind.

tests/distributed/test_training.py has it on four processes.
"""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from attnres.analysis.draw.inspect_page import _kinds
from attnres.analysis.measure.inspect import inspect
from attnres.errors import UsageError
from attnres.hf import AttnResForCausalLM
from attnres.model import Decoder, DecoderConfig, layer
from attnres.model.cache import KeyValueCache
from attnres.model.generate import generate
from attnres.model.layers import Layer, register
from attnres.model.layers.gqa import layer_input, rotate
from attnres.parallel.config import ParallelConfig
from attnres.plan.prompt import plan_inference
from attnres.plan.training import plan

SHAPE = dict(
    vocab_size=61,
    hidden_size=32,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    attention_pattern=("sliding_window", "gqa"),
    sliding_window=5,
    initializer_range=0.2,
)
IDS = torch.randint(0, 61, (2, 23), generator=torch.Generator().manual_seed(0))


def decoder(**changes) -> Decoder:
    model = Decoder(DecoderConfig(**{**SHAPE, **changes}), seed=3).double()
    for parameter in model.residual.parameters():
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    return model


@pytest.mark.parametrize(("window", "tokens"), [(2, 1), (2, 9), (4, 16), (5, 23), (23, 23), (64, 23)])
def test_it_is_a_masked_softmax(window, tokens):
    attention = decoder(sliding_window=window).layers[0]
    x_BTD = torch.randn(2, tokens, 32, dtype=torch.float64, requires_grad=True)
    context = decoder().context(tokens, x_BTD.device)
    q, k, v = (
        projection(x_BTD).unflatten(-1, (-1, 8)).transpose(1, 2)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    q, k, v = rotate(q, context), *(x.repeat_interleave(2, 1) for x in (rotate(k, context), v))
    age = torch.arange(tokens)[:, None] - torch.arange(tokens)
    scores = (q @ k.mT / 8**0.5).masked_fill((age < 0) | (age >= window), -torch.inf)
    want = attention.o_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
    found = attention(x_BTD, context)
    torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad(y.square().sum(), [x_BTD, attention.k_proj.weight]) for y in (found, want)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10)


def test_it_trains():
    model = decoder()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        loss = F.cross_entropy(model(IDS[:, :-1]).flatten(0, 1), IDS[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


@torch.no_grad()
@pytest.mark.parametrize("parts", [[1] * 23, [9, 1, 4, 9], [20, 3]])
def test_generation_with_a_cache_is_that_without(parts):
    model, cache = decoder().eval(), KeyValueCache()
    logits = torch.cat([model(part, cache) for part in IDS.split(parts, 1)], 1)
    torch.testing.assert_close(logits, model(IDS), rtol=1e-12, atol=1e-12)
    ids = IDS[0, :7]
    found = list(generate(model, ids, 12, temperature=0))
    for _ in range(12):
        ids = torch.cat([ids, model(ids[None])[0, -1].argmax()[None]])
    assert found == ids[7:].tolist()
    with pytest.raises(UsageError, match="the cache is of another architecture"):
        decoder(sliding_window=6)(IDS, cache)


def test_it_is_planned():
    config = DecoderConfig(**SHAPE)
    parallel = ParallelConfig(tp=2, pp=2)
    found = plan(config, parallel, batch_size=4, context=24)
    assert found.model_parameters == config.parameter_counts()["total"] and len(found.ranks) == 2
    with pytest.raises(UsageError, match=r"num_key_value_heads must be a multiple of parallel\.tp: 2 over 4"):
        plan(config, ParallelConfig(tp=4), batch_size=4, context=24)
    cache = KeyValueCache()
    with torch.no_grad():
        decoder().float()(IDS, cache)
    kept = sum(tensor.nbytes for tensor in tree_leaves([cache.keys, cache.values]))
    assert plan_inference(config, 2, 23, precision=torch.float32, device="cpu").cache_bytes == kept


def test_flops_count_the_keys_that_are_seen():
    full, windowed = (DecoderConfig(**{**SHAPE, "attention_pattern": (kind,)}) for kind in ("gqa", "sliding_window"))
    assert full.flops_per_token(5) == windowed.flops_per_token(5)
    seen = sum(min(t, 5) for t in range(1, 24)) / 23
    assert full.flops_per_token(23) - windowed.flops_per_token(23) == pytest.approx(3 * 4 * 4 * 32 * (12 - seen))


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("pattern", [("sliding_window", "gqa"), ("sliding_window",), ("kda", "sliding_window")])
def test_it_goes_to_hugging_face_and_back(tmp_path, pattern, implementation):
    model = decoder(attention_pattern=pattern, linear_chunk_size=4).eval()
    AttnResForCausalLM.from_decoder(model).save_pretrained(tmp_path)
    loaded = AttnResForCausalLM.from_pretrained(tmp_path, attn_implementation=implementation, dtype=torch.float64)
    torch.testing.assert_close(loaded(IDS).logits, model(IDS), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(loaded.to_decoder()(IDS), model(IDS), rtol=1e-12, atol=1e-12)
    prompt, greedy = IDS[:, :7], {"max_new_tokens": 12, "do_sample": False}
    want = loaded.generate(prompt, use_cache=False, **greedy)
    assert torch.equal(loaded.generate(prompt, **greedy), want)
    if "kda" not in pattern:
        assert torch.equal(loaded.generate(prompt, cache_implementation="static", **greedy), want)
    positions = torch.cat([torch.arange(11), torch.arange(12)])[None].expand(2, -1)
    packed = loaded(IDS, position_ids=positions, use_cache=False).logits
    apart = torch.cat([model(part) for part in IDS.split([11, 12], 1)], 1)
    torch.testing.assert_close(packed, apart, rtol=1e-12, atol=1e-12)


def test_it_is_inspected():
    model = decoder()
    found = inspect(model, IDS[0], per_read=False)
    assert found.mixing.shape == (9, 9) and found.source_change.isfinite().all()
    assert _kinds(model, 8)[:3] == ["window attention", "MLP", "attention"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sliding_window": None}, "sliding_window must be given for the sliding_window layers"),
        ({"sliding_window": 1}, "sliding_window must be a whole number of at least 2; it is 1"),
        ({"sliding_window": 2.5}, "sliding_window must be a whole number of at least 2; it is 2.5"),
    ],
)
def test_refuses(changes, message):
    with pytest.raises(UsageError, match=message):
        DecoderConfig(**{**SHAPE, **changes})


def test_a_layer_of_ones_own_is_used_by_its_name(monkeypatch):
    monkeypatch.setattr(layer, "_kinds", dict(layer._kinds))

    @register("mean")
    class Mean(Layer):
        def __init__(self, config, block):
            super().__init__()
            self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
            self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

        def forward(self, x_BTD, context):
            count = torch.arange(1, x_BTD.shape[1] + 1).to(x_BTD)[:, None]
            return self.o_proj(layer_input(self, x_BTD, context).cumsum(1) / count)

    @register("linear")
    class Linear(Layer):
        word, is_attention = "linear", False

        def __init__(self, config, block):
            super().__init__()
            self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
            self.down_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

        def forward(self, x_BTD, context):
            return self.down_proj(layer_input(self, x_BTD, context))

    model = decoder(attention_pattern=("mean",), feed_forward="linear")
    assert [type(part) for part in model.layers[:2]] == [Mean, Linear]
    early = model(IDS[:, :5])
    torch.testing.assert_close(model(IDS)[:, :5], early, rtol=1e-12, atol=1e-12)
    assert model.config.parameter_counts()["activated"] > 0
    with pytest.raises(UsageError, match=r"parallel\.tp must be 1 for (Mean|Linear) layers, which do not say how"):
        plan(model.config, ParallelConfig(tp=2), batch_size=2, context=8)
    with pytest.raises(ValueError, match=r"layer .mean. is already registered, by .*Mean"):
        register("mean")(Linear)
    with pytest.raises(UsageError, match="attention_pattern has the unknown kind 'linear'; known: gqa, mla, kda"):
        decoder(attention_pattern=("linear",))
    with pytest.raises(UsageError, match="feed_forward has the unknown kind 'mean'; known: swiglu, experts, linear"):
        decoder(feed_forward="mean")
