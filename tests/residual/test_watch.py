"""Layers that change what the residual connection keeps: noticed by the switch, and nothing else is."""

import pytest
import torch
from torch import nn

from attnres import residual
from attnres.errors import UsageError

from .loop import DIM, layers_of, randomised, run


class OneBuffer(nn.Module):
    """Writes every output into the same memory."""

    def __init__(self, layer, buffer):
        super().__init__()
        self.layer, self.buffer = layer, buffer

    def forward(self, x):
        return self.buffer.copy_(self.layer(x))


class InPlace(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x.mul_(2))


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("lean", [True, False])
@pytest.mark.parametrize("name", residual.names())
def test_good_layers_pass_and_nothing_stays(name, lean, grad):
    res, layers = randomised(residual.build(name, DIM, 6)), layers_of(6)
    res.lean = lean
    embedding = torch.randn(3, DIM, dtype=torch.float64)
    before = dict(vars(res))
    with torch.set_grad_enabled(grad):
        want = run(res, embedding, layers)
        with residual.watched(res):
            found = [run(res, embedding, layers) for _ in range(2)][1]
            interleaved(res, embedding, layers)
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
    assert vars(res) == before


def interleaved(res, embedding, layers):
    """Two states at once, as micro-batches have them."""
    states = [res.start(embedding), res.start(2 * embedding)]
    for i, layer in enumerate(layers):
        for k, state in enumerate(states):
            h, state = res.read(state, i)
            states[k] = res.write(state, i, layer(h))
    return [res.finish(state) for state in states]


@torch.no_grad()
@pytest.mark.parametrize("name", ["full_attnres", "block_attnres", "delta_attnres"])
def test_an_output_buffer_that_is_used_again(name):
    res, embedding = randomised(residual.build(name, DIM, 6)), torch.randn(3, DIM, dtype=torch.float64)
    layers = layers_of(6)
    buffer = torch.empty(3, DIM, dtype=torch.float64)
    bad = [*layers[:2], *(OneBuffer(layer, buffer) for layer in layers[2:])]
    run(res, embedding, bad)  # without a word
    with residual.watched(res), pytest.raises(UsageError, match="changed in place before the write of layer 3"):
        run(res, embedding, bad)
    run(res, embedding, bad)


@torch.no_grad()
@pytest.mark.parametrize("name", ["prenorm", "full_attnres", "block_attnres"])
def test_an_input_that_is_changed(name):
    """Layer 0 sees the embedding itself."""
    res, layers = randomised(residual.build(name, DIM, 6)), layers_of(6)
    embedding = torch.randn(3, DIM, dtype=torch.float64)
    with residual.watched(res), pytest.raises(UsageError, match="before the write of layer 0"):
        run(res, embedding, [InPlace(layers[0]), *layers[1:]])


@torch.no_grad()
def test_the_last_layer_is_seen_too():
    res, embedding = randomised(residual.build("full_attnres", DIM, 2)), torch.randn(3, DIM, dtype=torch.float64)
    with residual.watched(res), pytest.raises(UsageError, match="before `finish`"):
        state = res.start(embedding)
        for i in range(2):
            h, state = res.read(state, i)
            state = res.write(state, i, h.clone())
        embedding.zero_()
        res.finish(state)
