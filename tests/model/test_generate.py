"""Sampling: what the cache, the temperature, top_k, the seed and the end token do."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from attnres.errors import Failure, UsageError
from attnres.model import Decoder, DecoderConfig
from attnres.model.generate import KeyValueCache, generate
from attnres.model.layers import gqa as attention

VOCABULARY = 23
PROMPT = torch.tensor([3, 1, 4, 1, 5])


def decoder(name="block_attnres"):
    shape = dict(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=4)
    options = {"num_blocks": 2} if name == "block_attnres" else {}
    shape |= dict(num_key_value_heads=2, max_position_embeddings=32, tie_word_embeddings=False, initializer_range=0.2)
    model = Decoder(DecoderConfig(**shape, residual=name, residual_options=options), seed=5).double()
    for parameter in model.residual.parameters():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    return model.eval()


@torch.no_grad()
def without_cache(model, prompt, count):
    ids = prompt
    for _ in range(count):
        ids = torch.cat([ids, model(ids[None])[0, -1].argmax()[None]])
    return ids[len(prompt) :].tolist()


@pytest.mark.parametrize("name", ["prenorm", "full_attnres", "block_attnres"])
def test_greedy_with_the_cache_equals_greedy_without(name):
    model = decoder(name)
    expected = without_cache(model, PROMPT, 27)
    assert list(generate(model, PROMPT, 27, temperature=0)) == expected
    assert len(set(expected)) > 3


@pytest.mark.parametrize("name", ["prenorm", "full_attnres", "block_attnres"])
@pytest.mark.parametrize("chunk", [1, 2, 5, 9])
def test_a_prompt_read_in_chunks_gives_the_same_tokens(name, chunk):
    model = decoder(name)
    lengths = []
    model.embed_tokens.register_forward_hook(lambda *call: lengths.append(call[-1].shape[1]))
    expected = without_cache(decoder(name), PROMPT, 20)
    assert list(generate(model, PROMPT, 20, temperature=0, prefill_chunk=chunk)) == expected
    assert max(lengths) == min(chunk, 5) and sum(lengths) == 5 + 19


@pytest.mark.parametrize("elements", [1 << 24, 40, 1])
def test_logits_do_not_depend_on_the_chunk(elements, monkeypatch):
    monkeypatch.setattr(attention, "MASK_ELEMENTS", elements)  # chunks over many slices of masks
    model, prompt = decoder(), torch.arange(20) % VOCABULARY
    with torch.no_grad():
        whole = model(prompt[None])
        for size in (1, 3, 7, 20):
            cache = KeyValueCache()
            parts = torch.cat([model(chunk, cache) for chunk in prompt[None].split(size, 1)], 1)
            torch.testing.assert_close(parts, whole, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_only_the_last_logits():
    model = decoder()
    torch.testing.assert_close(model(PROMPT[None], logits_to_keep=2), model(PROMPT[None])[:, -2:])


def test_a_chunk_of_no_tokens_is_refused():
    assert list(generate(decoder(), PROMPT, 1, prefill_chunk=2**80)) == list(generate(decoder(), PROMPT, 1))
    with pytest.raises(UsageError, match="prefill_chunk"):
        next(generate(decoder(), PROMPT, 1, prefill_chunk=0))


LOGITS = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(0))


def draws(count=4000, **options):
    """How often each token is drawn from LOGITS."""

    def model(tokens, cache, logits_to_keep):
        return LOGITS.expand(1, 1, VOCABULARY)

    model.config = SimpleNamespace(max_position_embeddings=count + 1)
    return Counter(generate(model, PROMPT[:1], count, **options))


def distance(found, temperature):
    chances = (LOGITS / temperature).softmax(-1).tolist()
    return sum(abs(found[token] / found.total() - chance) for token, chance in enumerate(chances)) / 2


@pytest.mark.parametrize(("temperature", "other"), [(1.0, 1.5), (3.0, 2.0)])
def test_draws_follow_the_model_at_the_temperature(temperature, other):
    found = draws(temperature=temperature)
    assert distance(found, temperature) < 0.05 < distance(found, other)


def test_top_k_draws_from_the_likeliest_only():
    assert set(draws(temperature=5.0, top_k=3)) == set(LOGITS.topk(3).indices.tolist())
    assert len(draws(temperature=5.0, top_k=10**6)) == VOCABULARY
    model = decoder()
    assert list(generate(model, PROMPT, 20, temperature=5.0, top_k=1)) == without_cache(model, PROMPT, 20)


def test_the_seed_decides():
    model = decoder()
    first, again, other = (list(generate(model, PROMPT, 20, temperature=2.0, seed=seed)) for seed in (7, 7, 8))
    assert first == again != other
    state = torch.get_rng_state()
    list(generate(model, PROMPT, 3))
    assert torch.equal(torch.get_rng_state(), state)


def test_the_end_token_ends_and_is_not_given():
    model = decoder()
    text = without_cache(model, PROMPT, 20)
    end = text[4]
    assert list(generate(model, PROMPT, 20, temperature=0, end=end)) == text[: text.index(end)]


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-300])
def test_a_temperature_near_zero_is_greedy(temperature):
    model = decoder()
    assert list(generate(model, PROMPT, 9, temperature=temperature)) == without_cache(model, PROMPT, 9)


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        (PROMPT[:0], {}, "prompt is empty"),
        (PROMPT[None], {}, r"prompt must be token ids of shape \[tokens\]"),
        (PROMPT, {"max_new_tokens": 28}, "context of 32 tokens; they are 5 and 28"),
        (PROMPT, {"max_new_tokens": 0}, "number of new tokens positive; they are .* 0"),
        (PROMPT, {"temperature": 0, "top_k": 5}, "leaves nothing for top_k, which is 5; leave one of them out"),
        (PROMPT, {"top_k": 0}, "top_k .* positive"),
        (PROMPT, {"temperature": -0.1}, "temperature must be zero or more"),
        (PROMPT, {"temperature": float("nan")}, "temperature must be zero or more"),
        (PROMPT, {"temperature": float("inf")}, "temperature must be zero or more"),
    ],
)
def test_bad_arguments(prompt, options, message):
    with pytest.raises(UsageError, match=message):
        list(generate(decoder(), prompt, **{"max_new_tokens": 5, **options}))


@pytest.mark.parametrize("temperature", [0, 0.8])
def test_a_model_that_is_not_finite_says_nothing(temperature):
    model = decoder()
    model.layers[1].up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(Failure, match=r"the model's output is not finite; .* use another checkpoint"):
        next(generate(model, PROMPT, 3, temperature=temperature))


def test_attention_of_varying_lengths_is_not_planned(monkeypatch):
    """cuDNN would build a plan for every new number of keys; who takes the tokens finds torch as it was."""
    torch.manual_seed(0)
    model = Decoder(DecoderConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2))
    seen, real = [], torch.nn.functional.scaled_dot_product_attention

    def attend(*args, **options):
        seen.append(torch.backends.cuda.cudnn_sdp_enabled())
        return real(*args, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attend)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)
    try:
        for _ in generate(model, torch.tensor([1, 2]), 3):
            assert torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
    assert seen == [False] * 3
