"""Generation by the forms without gradients: tokens of the training path, and a step of fixed shapes that compiles."""

import copy

import pytest
import torch
from transformers import StaticCache

from attnres import hf
from attnres.hf import AttnResConfig, AttnResForCausalLM

from .converted import build, move_queries

SHAPE = dict(vocab_size=61, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=64)
IDS = torch.randint(1, 61, (2, 7), generator=torch.Generator().manual_seed(0))
NEW = 6


def native(residual: str, **options) -> AttnResForCausalLM:
    torch.manual_seed(0)
    config = AttnResConfig(**SHAPE, initializer_range=0.3, residual=residual, residual_options=options)
    model = AttnResForCausalLM(config).eval()
    for parameter in model.model.residual.parameters():
        torch.nn.init.normal_(parameter)
    return model


def by_training_path(model, ids=IDS):
    for _ in range(NEW):
        logits = model(ids, use_cache=False).logits
        assert logits.requires_grad
        ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], 1)
    return ids


@pytest.mark.parametrize("chunk", [None, 3])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "mixtral"])
def test_converted_models_generate_the_tokens_of_the_training_path(name, chunk):
    model = move_queries(hf.convert(copy.deepcopy(build(name)), num_blocks=3))
    greedy = dict(do_sample=False, max_new_tokens=NEW, pad_token_id=0, eos_token_id=None)
    assert torch.equal(model.generate(IDS, **greedy, prefill_chunk_size=chunk), by_training_path(model))


@pytest.mark.parametrize(("residual", "options"), [("block_attnres", {"num_blocks": 2}), ("full_attnres", {})])
def test_a_step_with_a_static_cache_is_one_graph(residual, options):
    """And the same graph for every token."""
    model = native(residual, **options)
    cache = StaticCache(config=model.config, max_cache_len=IDS.shape[1] + NEW)
    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    step = torch.compile(model, backend=count, fullgraph=True, dynamic=False)
    with torch.no_grad():
        token = model(IDS, past_key_values=cache).logits[:, -1:].argmax(-1)
        ids = torch.cat([IDS, token], 1)
        for position in range(IDS.shape[1], IDS.shape[1] + NEW - 1):
            positions = torch.full((1, 1), position)
            logits = step(token, past_key_values=cache, position_ids=positions).logits
            token = logits[:, -1:].argmax(-1)
            ids = torch.cat([ids, token], 1)
    assert len(graphs) == 1
    assert torch.equal(ids, by_training_path(model))
