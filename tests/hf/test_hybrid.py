"""Hugging Face models of the hybrid architecture: cached generation, padding, saving, and what is refused."""

import pytest
import torch
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, DynamicCache, GenerationConfig

from attnres.errors import UsageError
from attnres.hf import AttnResConfig, AttnResForCausalLM
from attnres.model import Decoder, DecoderConfig
from attnres.model.generate import generate

SHAPE = {
    "vocab_size": 41,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "attention_pattern": ("kda", "gqa", "mla"),
    "linear_chunk_size": 4,
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
    "residual_options": {"num_blocks": 2},
}
IDS = torch.randint(0, 41, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def decoder():
    built = Decoder(DecoderConfig(**SHAPE), seed=2).double().eval()
    with torch.no_grad():
        for parameter in built.residual.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(1))
    return built


@pytest.fixture(scope="module")
def model(decoder):
    return AttnResForCausalLM.from_decoder(decoder).eval()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_the_logits_are_the_decoders(decoder, model, implementation):
    model.set_attn_implementation(implementation)
    torch.testing.assert_close(model(IDS).logits, decoder(IDS), rtol=1e-10, atol=1e-10)
    model.set_attn_implementation("sdpa")


@torch.no_grad()
@pytest.mark.parametrize("parts", [[1] * 9, [4, 1, 4], [2, 7]])
def test_cached_decoding_equals_full_recomputation(model, parts):
    cache, found = DynamicCache(config=model.config), []
    for part in IDS.split(parts, 1):
        found.append(model(part, past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(found, 1), model(IDS, use_cache=False).logits, rtol=1e-10, atol=1e-10)
    assert cache.get_seq_length() == 9


def test_generation_with_and_without_a_cache_agrees(model):
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    with_cache = model.generate(IDS, **options)
    assert torch.equal(with_cache, model.generate(IDS, **options, use_cache=False))
    beams = {"num_beams": 3, **options}
    assert torch.equal(model.generate(IDS, **beams), model.generate(IDS, **beams, use_cache=False))


@torch.no_grad()
def test_padding_on_the_left_changes_nothing(model):
    padded = torch.cat([torch.full((2, 3), 7), IDS], 1)
    mask = torch.ones_like(padded)
    mask[:, :3] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(padded, attention_mask=mask, position_ids=positions).logits[:, 3:]
    torch.testing.assert_close(logits, model(IDS).logits, rtol=1e-10, atol=1e-10)


def test_saving_and_loading(model, decoder, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert loaded.config.attention_pattern == SHAPE["attention_pattern"]
    assert all(
        torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), model.state_dict().values(), strict=True)
    )
    assert not any(layer.load.any() for layer in loaded.model.layers if hasattr(layer, "load"))
    again = loaded.to_decoder()
    torch.testing.assert_close(again.eval()(IDS), decoder(IDS))


def test_every_parameter_starts_at_the_scale_of_the_decoder():
    config = {**SHAPE, "hidden_size": 64}
    model, decoder = AttnResForCausalLM(AttnResConfig(**config)), Decoder(DecoderConfig(**config))
    for name, value in decoder.named_parameters():
        own = model.get_parameter(name if name.startswith("lm_head") else f"model.{name}")
        if value.numel() > 500:
            assert own.std().item() == pytest.approx(value.std().item(), rel=0.3), name


def test_checkpointing_gives_the_same_gradients(model, monkeypatch):
    monkeypatch.setattr(model.model.residual, "schedule", "layerwise")  # as a lean state is read
    model.train()
    found = []
    for enabled in (False, True):
        model.gradient_checkpointing_enable() if enabled else model.gradient_checkpointing_disable()
        model.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        found.append([parameter.grad.clone() for parameter in model.parameters()])
    model.gradient_checkpointing_disable()
    model.zero_grad()
    model.eval()
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_cache_of_another_architecture_is_refused(model):
    with pytest.raises(UsageError, match=r"another architecture.*DynamicCache"):
        model(IDS, past_key_values=DynamicCache())
    dense = AttnResForCausalLM(AttnResConfig(**{**SHAPE, "attention_pattern": ("gqa",)}))
    with pytest.raises(UsageError, match="another architecture"):
        dense(IDS, past_key_values=DynamicCache(config=model.config))
    linear = AttnResForCausalLM(AttnResConfig(**{**SHAPE, "attention_pattern": ("kda",)}))
    assert linear(IDS).logits.shape == (2, 9, 41)
    with pytest.raises(UsageError, match="use_cache=False"):
        linear(IDS, use_cache=True)


LINEAR = {**SHAPE, "attention_pattern": ("kda",)}


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cache_implementation": "static"},
        {"cache_implementation": "dynamic"},
        {"cache_implementation": "offloaded"},
        {"num_beams": 3},
        {"generation_config": GenerationConfig(max_new_tokens=3, use_cache=True)},
    ],
    ids=lambda options: "-".join(map(str, options.values())) if "generation_config" not in options else "config",
)
def test_linear_attention_alone_is_told_what_generates(options):
    model = AttnResForCausalLM(AttnResConfig(**LINEAR)).double().eval()
    with pytest.raises(UsageError, match=r"use_cache=False.*attnres.model.generate"):
        model.generate(IDS, **{"max_new_tokens": 3, **options})
    greedy = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "use_cache": False}
    found = model.generate(IDS[:1], **greedy)
    own = list(generate(model.to_decoder().eval(), IDS[0], 3, temperature=0))
    assert found[0, 9:].tolist() == own
    assert model.generate(IDS, **greedy, num_beams=2).shape == (2, 12)


@torch.no_grad()
def test_a_static_cache_decodes_and_beams_as_none_does(model):
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    for beams in (1, 2):
        want = model.generate(IDS, **options, num_beams=beams, use_cache=False)
        for cache in ("static", "dynamic"):
            found = model.generate(IDS, **options, num_beams=beams, cache_implementation=cache)
            assert torch.equal(found, want), (beams, cache)
    chunks = model.generate(IDS, **options, prefill_chunk_size=4)
    assert torch.equal(chunks, model.generate(IDS, **options, use_cache=False))


@pytest.mark.parametrize(
    ("pattern", "sizes", "works"),
    [
        (("gqa",), {"num_key_value_heads": 2}, True),
        (("mla",), {"qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 8}, True),
        (("mla",), {}, False),
        (("gqa", "mla"), {"v_head_dim": 6}, False),
        (("kda", "gqa"), {}, False),
    ],
)
def test_continuous_batching_is_refused_where_its_cache_has_no_place(pattern, sizes, works):
    config = AttnResConfig(**{**SHAPE, "num_experts": 0, "attention_pattern": pattern, **sizes})
    model = AttnResForCausalLM(config).eval()
    greedy = GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=-1, pad_token_id=0)
    room = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=16)
    prompts = IDS.tolist()
    if not works:
        with pytest.raises(
            UsageError, match=f"continuous batching keeps .* and the {pattern[-1] if 'mla' in pattern else 'kda'}"
        ):
            model.generate_batch(prompts, greedy, continuous_batching_config=room)
        return
    want = model.generate(IDS, generation_config=greedy)[:, 9:].tolist()
    model.set_attn_implementation("paged|sdpa")
    results = model.generate_batch(prompts, greedy, continuous_batching_config=room, warmup=False)
    assert [result.generated_tokens for result in results.values()] == want
