"""Reads without gradients: the function of the reads with them, by another way."""

import pytest
import torch
from torch import nn

from attnres import ops, residual
from attnres.ops import dispatch

DIM = 11
CASES = [
    ("full_attnres", 7, {}),
    ("full_attnres", 7, {"window": 3}),
    ("full_attnres", 7, {"schedule": "two_phase"}),
    ("block_attnres", 9, {"num_blocks": 3}),
    ("block_attnres", 8, {"block_size": 3, "temperature": 1.7}),
    ("block_attnres", 6, {"num_blocks": 1}),
    ("block_attnres", 5, {"num_blocks": 5}),
    ("block_attnres", 8, {"num_blocks": 3, "schedule": "layerwise"}),
    ("block_attnres", 8, {"num_blocks": 2, "query": "input"}),  # not the published weights: no fused forms
    ("block_attnres", 8, {"num_blocks": 2, "reads": "transformer_block"}),
    ("block_attnres", 9, {"num_blocks": 2, "reads": "block"}),
    ("block_attnres", 8, {"num_blocks": 2, "reads": "mlp"}),
    ("delta_attnres", 6, {}),
]


def build(name, count, options):
    torch.manual_seed(0)
    res = residual.build(name, DIM, count, **options).double()
    for parameter in res.parameters():
        nn.init.normal_(parameter)
    layers = [nn.Linear(DIM, DIM).double() for _ in range(count)]
    norms = [nn.RMSNorm(DIM, 0.1).double() for _ in range(count + 1)]
    return res, layers, norms


def run(res, layers, norms, embedding):
    """What every layer and the output head see."""
    state, seen = res.start(embedding), []
    for i, layer in enumerate(layers):
        x, state = res.read(state, i, norms[i])
        state = res.write(state, i, layer(x))
        seen.append(x)
    return torch.stack([*seen, res.finish(state, norms[-1])])


@pytest.mark.parametrize(("name", "count", "options"), CASES)
@pytest.mark.parametrize("shape", [(1, 1), (2, 5)])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_every_read_is_the_one_with_gradients(name, count, options, shape, mode):
    model = build(name, count, options)
    embedding = torch.randn(*shape, DIM, dtype=torch.float64)
    want = run(*model, embedding)
    with mode():
        got = run(*model, embedding)
        assert not got.requires_grad
    torch.testing.assert_close(got, want.detach(), rtol=1e-10, atol=1e-10)


def test_a_layer_of_a_block_is_one_merge(monkeypatch):
    """Phase 1 once a block, for all its layers; then the pending add, the merge and the norm in one call."""
    calls = []
    with torch.no_grad():
        backend = type(dispatch.select(torch.zeros(1, DIM, dtype=torch.float64)))
    for name in ("inter_block_chained", "merge_norm", "read_norm"):
        form = getattr(backend, name)
        monkeypatch.setattr(backend, name, lambda *a, name=name, form=form, **k: calls.append(name) or form(*a, **k))
    model = build("block_attnres", 6, {"num_blocks": 2})
    with torch.no_grad():
        run(*model, torch.randn(1, 1, DIM, dtype=torch.float64))
    block = ["inter_block_chained", "merge_norm", "merge_norm"]
    assert calls == [*block, *block, "read_norm"]


@pytest.mark.parametrize("name", ["block_attnres", "full_attnres"])
def test_gradients_reach_the_queries_of_a_state_begun_without_them(name):
    res, layers, _norms = build(name, 6, {"num_blocks": 2} if name == "block_attnres" else {})
    with torch.no_grad():
        state = res.start(torch.randn(2, DIM, dtype=torch.float64))
        for i in range(2):
            x, state = res.read(state, i)
            state = res.write(state, i, layers[i](x))
    x, _ = res.read(state, 2)
    x.sum().backward()
    assert res.pseudo_query.grad[2].abs().min() > 0 and res.key_norm.grad[2].abs().min() > 0


def test_a_lean_state_holds_nothing_else():
    res, _layers, norms = build("block_attnres", 6, {"num_blocks": 2})
    res.lean = True
    with torch.no_grad():
        state = res.start(torch.randn(1, DIM, dtype=torch.float64))
        _, state = res.read(state, 0, norms[0])
    assert state.folded is None and not state.outs and not state.lses


def test_bad_updates_are_still_named():
    res, _, norms = build("block_attnres", 6, {"num_blocks": 2})
    with torch.no_grad():
        state = res.start(torch.randn(2, 3, DIM, dtype=torch.float64))
        _, state = res.read(state, 0, norms[0])
        state = res.write(state, 0, torch.randn(1, 3, DIM, dtype=torch.float64))  # broadcasting would hide it
        with pytest.raises(ValueError, match="share one shape"):
            res.read(state, 1, norms[1])
    with torch.no_grad(), pytest.raises(ValueError, match="share one shape"):
        ops.add_norm(torch.zeros(2, 3), torch.zeros(1, 3))
