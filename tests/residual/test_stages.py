"""A network cut into stages: each holds its own layers' parameters, and tensors have names that say what they are."""

import copy

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

from attnres import residual

DIM, LAYERS = 12, 7
CASES = [
    ("prenorm", {}),
    ("full_attnres", {}),
    ("block_attnres", {"block_size": 3}),
    ("block_attnres", {"num_blocks": 2}),
    ("full_attnres", {"schedule": "two_phase"}),
    ("block_attnres", {"num_blocks": 2, "schedule": "two_phase"}),
    ("block_attnres", {"block_size": 4, "reads": "transformer_block"}),
    ("block_attnres", {"num_blocks": 2, "reads": "block"}),
    ("block_attnres", {"block_size": 2, "reads": "mlp"}),
    ("rezero", {}),
    ("layerscale", {}),
    ("x0_lambdas", {}),
    ("highway", {}),
    ("deepnorm", {}),
    ("keel", {}),
    ("siamesenorm", {}),
    ("laurel", {}),
    ("laurel", {"previous": 2}),
    ("delta", {}),
    ("gated_residual", {}),
    ("hyper_connections", {}),
    ("hyper_connections", {"num_streams": 2, "dynamic": False}),
    ("mhc", {}),
    ("mhc_lite", {"num_streams": 3}),
    ("denseformer", {}),
    ("denseformer", {"block_size": 3, "dilation": 2, "period": 2}),
    ("muddformer", {}),
    ("ancre", {}),
    ("delta_attnres", {}),
    ("delta_attnres", {"block_size": 3}),
    ("multihead_attnres", {}),
    ("multihead_attnres", {"block_size": 3}),
    ("lowrank_attnres", {}),
    ("lowrank_attnres", {"block_size": 3}),
]


def network(name, options):
    torch.manual_seed(3)
    res = residual.build(name, DIM, LAYERS, **options).double()
    for p in res.parameters():
        nn.init.normal_(p)
    layers = nn.ModuleList(nn.Sequential(nn.Linear(DIM, DIM), nn.Tanh()) for _ in range(LAYERS)).double()
    res.lean = True
    return res, layers


def advance(res, layers, state, first, last):
    for i in range(first, last):
        h, state = res.read(state, i)
        state = res.write(state, i, layers[i](h))
    return state


def count(name, parameter, rows):
    """Numbers of a parameter that belong to the layers `rows`."""
    layer = name.rpartition(".")[2]  # an entry of a dictionary is named for its layer
    if layer.isdigit():
        return parameter.numel() if int(layer) in range(LAYERS + 1)[rows] else 0
    return parameter[rows].numel()


@pytest.mark.parametrize(("name", "options"), CASES)
def test_stages_that_hold_their_own_layers_make_the_whole(name, options):
    whole, layers = network(name, options)
    embedding = torch.randn(5, DIM, dtype=torch.float64)
    want = whole.finish(advance(whole, layers, whole.start(embedding), 0, LAYERS))
    state = whole.start(embedding)
    for first, last in ((0, 2), (2, 5), (5, LAYERS)):
        stage = copy.deepcopy(whole)
        stage.keep_layers(first, last)
        rows = slice(first, last + (last == LAYERS))  # the output read's come with the last
        held = sum(count(name, parameter, rows) for name, parameter in whole.named_parameters())
        assert sum(parameter.numel() for parameter in stage.parameters()) == held
        state = advance(stage, layers, state, first, last)
    torch.testing.assert_close(stage.finish(state), want, rtol=0, atol=0)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_equal_names_are_equal_tensors(name, options):
    res, layers = network(name, options)
    state, seen = res.start(torch.randn(5, DIM, dtype=torch.float64)), {}
    for layer in range(LAYERS):
        tensors = [leaf for leaf in pytree.tree_leaves(state) if leaf is not None]
        names = res.tensor_names(state, layer)
        assert len(set(names)) == len(names) == len(tensors)
        for key, tensor in zip(names, tensors, strict=True):
            assert torch.equal(seen.setdefault(key, tensor), tensor)
        state = advance(res, layers, state, layer, layer + 1)
    streams = {"transformer_block": 3, "block": 5, "mlp": LAYERS}.get(options.get("reads"), 0)
    history = {"full_attnres": 7, "block_attnres": 7 + streams}
    history |= {"siamesenorm": 2 * LAYERS, "x0_lambdas": LAYERS + 1}
    assert len(seen) == history.get(name, LAYERS), "whatever never changes keeps its name"
