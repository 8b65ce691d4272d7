"""The experiment on how often depth is read: its forms are what they say, its grid goes on, its table is right."""

import sys
from pathlib import Path

import pytest
import torch

from attnres import residual
from attnres.residual import registry

from ..residual.loop import layers_of, randomised, run

DIM, LAYERS = 6, 8


@pytest.fixture(autouse=True)
def forms(benchmarks: Path, monkeypatch: pytest.MonkeyPatch):
    """The experimental forms, registered for one test."""
    monkeypatch.setattr(registry, "_classes", dict(registry._classes))
    monkeypatch.delitem(sys.modules, "reads_forms", raising=False)
    import reads_forms

    yield reads_forms
    del sys.modules["reads_forms"]


def build(**options):
    return residual.build("sparse_reads", DIM, LAYERS, stream_scale=True, **options)


def inputs_of(res):
    torch.manual_seed(1)
    return run(res.double(), torch.randn(3, DIM, dtype=torch.float64), layers_of(LAYERS, DIM))


@pytest.mark.parametrize("num_blocks", [2, 3, LAYERS])
def test_a_read_in_front_of_every_layer_is_the_papers(num_blocks):
    paper = randomised(residual.build("block_attnres", DIM, LAYERS, num_blocks=num_blocks, stream_scale=True))
    got = inputs_of(randomised(build(num_blocks=num_blocks, every=1)))
    torch.testing.assert_close(got, inputs_of(paper), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("others", ["last_read", "sum"])
@pytest.mark.parametrize(("every", "offset"), [(1, 0), (2, 0), (2, 1), (4, 0)])
def test_zero_queries_are_prenorm(every, offset, others):
    res = build(num_blocks=2, every=every, offset=offset, others=others)
    want = inputs_of(residual.build("prenorm", DIM, LAYERS))
    torch.testing.assert_close(inputs_of(res), want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("others", ["last_read", "sum"])
@pytest.mark.parametrize(
    ("num_blocks", "every", "offset"), [(2, 2, 0), (2, 2, 1), (2, 4, 0), (LAYERS, 2, 0), (3, 2, 1)]
)
def test_reads_are_the_formula(num_blocks, every, offset, others):
    res = randomised(build(num_blocks=num_blocks, every=every, offset=offset, others=others))
    layers, size = layers_of(LAYERS, DIM), LAYERS // num_blocks
    torch.manual_seed(1)
    v = [torch.randn(3, DIM, dtype=torch.float64)]
    want, stream = [], v[0]
    for layer in range(LAYERS + 1):
        # the layers' outputs v[1], v[2], .. in blocks, those of the last block with what is left over
        begins = [size * n for n in range(num_blocks)]
        ends = [*begins[1:], LAYERS]
        blocks = [v[0], *(sum(v[1 + a : 1 + min(b, layer)]) for a, b in zip(begins, ends, strict=True) if a < layer)]
        if layer in (0, LAYERS) or layer % every == offset:
            keys = [b / (b.square().mean(-1, keepdim=True) + 1e-6).sqrt() * res.key_norm[layer] for b in blocks]
            weights = torch.stack([(k * res.pseudo_query[layer]).sum(-1) for k in keys]).softmax(0)
            h = len(blocks) * sum(w.unsqueeze(-1) * b for w, b in zip(weights, blocks, strict=True))
            seen = h
            stream = h if others == "last_read" else sum(v)
        else:
            seen = stream
        want.append(seen)
        if layer < LAYERS:
            v.append(layers[layer](seen))
            stream = stream + v[-1]
    torch.testing.assert_close(inputs_of(res), want, rtol=1e-10, atol=1e-10)
