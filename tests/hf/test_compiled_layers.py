"""Layers compiled one by one: layers of a kind share what is compiled, whatever number of sources they read.

There are more of them than torch compiles one function anew (`recompile_limit`), beyond which `fullgraph` raises.
"""

import copy

import pytest
import torch

from attnres import hf

from .converted import build, move_queries, tokens, with_moved_queries

DEPTH = 30


def compile_layers(layers):
    """Compiles every layer as one graph; returns the list to which each compilation adds its graph."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    for layer in layers:
        layer.compile(backend=backend, fullgraph=True)
    return graphs


def results(model):
    logits = model(tokens(), use_cache=False).logits
    return [logits, *torch.autograd.grad(logits.square().mean(), list(model.parameters()), materialize_grads=True)]


def test_those_of_the_original_compile_once():
    model = build("llama", num_hidden_layers=DEPTH)
    graphs = compile_layers(model.model.layers)
    results(model)
    assert len(graphs) == 1 and torch._dynamo.config.recompile_limit < DEPTH


@pytest.mark.parametrize("residual", ["block_attnres", "full_attnres"])
@pytest.mark.parametrize("name", ["native", "llama", "qwen3", "gemma2", "gpt_neox_parallel"])
def test_layers_of_a_kind_compile_once(name, residual):
    model = with_moved_queries(name, residual, torch.float64, num_hidden_layers=DEPTH)
    want = results(model)
    graphs = compile_layers(model.base_model.layers)
    torch.testing.assert_close(results(model), want)
    kinds = 2 if name == "gemma2" else 1  # sliding and full attention
    assert 2 <= len(graphs) <= kinds + 1, "the attention of each kind and the MLP"


def test_a_compiled_layer_is_a_layer_still():
    model = move_queries(hf.convert(build("llama")))
    want = model(tokens()).logits
    compile_layers(model.model.layers)
    whole = torch.compile(lambda ids: model(ids, use_cache=False).logits, backend="eager", fullgraph=True)
    torch.testing.assert_close(whole(tokens()), want)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    torch.testing.assert_close(model(tokens()).logits, want)
    model.eval()
    torch.testing.assert_close(copy.deepcopy(model)(tokens()).logits, want)
    assert "_compiled_sublayer" not in model.model.layers[0].__getstate__()
