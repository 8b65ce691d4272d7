"""Generation that checks several guessed tokens at once writes the text that it writes one token at a time."""

import pytest
import torch

pytest.importorskip("transformers")
import transformers

from .converted import PAD, build, tokens, with_moved_queries

is_old = tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 19)
GREEDY = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": PAD, "eos_token_id": None}
TARGETS = [
    ("native", "block_attnres"),
    ("native", "full_attnres"),
    ("llama", "block_attnres"),
    ("llama", "full_attnres"),
    ("qwen3", "block_attnres"),
]


def assistants():
    """A shallower native model, a converted one and one of a plain architecture, all of one vocabulary."""
    return [
        with_moved_queries("native", num_hidden_layers=1),
        with_moved_queries("llama", num_hidden_layers=1),
        build("llama", torch.float32),  # whose weights are those of the converted target: half its guesses are right
    ]


@pytest.mark.parametrize(("name", "residual"), TARGETS)
def test_greedy_text_does_not_depend_on_who_guesses(name, residual):
    model = with_moved_queries(name, residual)
    prompt = torch.cat([tokens(1), tokens(1)], 1)  # where a lookup finds something
    expected = model.generate(prompt, **GREEDY)
    passes = []
    model.model.register_forward_hook(lambda module, args, output: passes.append(output.last_hidden_state.shape[1]))
    ways = [{"assistant_model": assistant} for assistant in assistants()]
    ways += [{"prompt_lookup_num_tokens": 3}, {"assistant_early_exit": 2}]
    if is_old and hasattr(model.config, "layer_types") and name != "native":
        ways.pop()  # drafts of such models, converted or not, fail there on caches of the layers that they leave out
    for way in ways:
        passes.clear()
        assert torch.equal(model.generate(prompt, **way, **GREEDY), expected), way
        assert passes[0] > prompt.shape[1] or max(passes[1:]) > 1, "guesses were checked together"


def test_a_good_assistant_saves_passes():
    model = with_moved_queries("llama")
    expected, passes = model.generate(tokens(1), **GREEDY), []
    model.model.register_forward_hook(lambda *_: passes.append(1))
    found = model.generate(tokens(1), assistant_model=with_moved_queries("llama"), **GREEDY)
    assert torch.equal(found, expected) and len(passes) < GREEDY["max_new_tokens"]
