"""The switches of the paper's ablation on Full and Block AttnRes, against their formulas written out."""

import itertools

import pytest
import torch

from attnres import residual
from attnres.errors import UsageError

from .loop import DIM, assert_formula, layers_of, randomised, rms_norm, run

LAYERS = 5


def sources_of(embedding, outputs, size, window):
    blocks = [sum(outputs[first : first + size]) for first in range(0, len(outputs), size)]
    return [embedding, *(blocks if window is None else blocks[-window:])]


def weights_of(res, i, values, heads, query, mixing, key_normalised, null_source, temperature):
    """[n, ..., heads, 1] for values [n, ..., heads, D / heads]."""
    n = len(values)
    if mixing == "static":
        return (res.static_weight[i, :n] / n).view(n, 1, 1, 1, 1)
    if query == "input":
        q = (rms_norm(values[-1].flatten(-2)) @ res.query_proj[i].T / DIM).unflatten(-1, (heads, -1))
    else:
        q = res.pseudo_query[i].view(heads, -1)
    keys = rms_norm(values, res.key_norm[i].view(heads, -1)) if key_normalised else values
    logits = (q * keys).sum(-1, keepdim=True) / temperature
    if mixing == "sigmoid":
        return 1 / (1 + (-logits).exp())
    return logits.exp() / (logits.exp().sum(0) + null_source)


FORMS = [
    {},
    {"temperature": 0.3},
    {"query": "input"},
    {"query": "input", "heads": 2, "null_source": True},
    {"mixing": "sigmoid"},
    {"mixing": "sigmoid", "heads": 3, "key_normalised": False, "temperature": 2.0},
    {"mixing": "static"},
    {"key_normalised": False},
    {"heads": 2},
    {"null_source": True},
]
PLACES = [("full_attnres", {}), ("full_attnres", {"window": 2}), ("block_attnres", {"block_size": 2})]


@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize(("name", "place"), PLACES)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_reads_are_the_formula(name, place, form, scale):
    res = randomised(residual.build(name, DIM, LAYERS, **place, **form, stream_scale=scale))
    switches = dict(query="learned", mixing="softmax", key_normalised=True, heads=1, null_source=False, temperature=1.0)
    switches |= form

    def written_out(x, layers):
        inputs, outputs = [], []
        for i in range(LAYERS + 1):
            sources = torch.stack(sources_of(x, outputs, place.get("block_size", 1), place.get("window")))
            values = sources.unflatten(-1, (switches["heads"], -1))
            h = (weights_of(res, i, values, **switches) * values).sum(0).flatten(-2)
            start = 2 if switches["mixing"] == "sigmoid" else len(sources) + switches["null_source"]
            inputs.append(h * (start if scale else 1))
            if i < LAYERS:
                outputs.append(layers[i](inputs[-1]))
        return inputs

    if form.get("mixing") == "static":  # one weight a source, the rows of early layers are longer than they need
        assert res.static_weight.shape == (LAYERS + 1, max(res.num_sources(i) for i in range(LAYERS + 1)))
    assert_formula(res, written_out, LAYERS)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("name", ["full_attnres", "block_attnres"])
def test_starts_as_the_plain_sum_at_its_scale(name, form):
    res = residual.build(name, DIM, 6, stream_scale=True, **form).double()
    x = torch.randn(4, DIM, dtype=torch.float64)
    want = run(residual.build("prenorm", DIM, 6), x, layers_of(6))
    torch.testing.assert_close(run(res, x, layers_of(6)), want, rtol=1e-12, atol=1e-12)


def test_a_window_as_long_as_the_network_is_none_and_a_short_one_keeps_the_state_small():
    x, layers = torch.randn(4, DIM, dtype=torch.float64), layers_of(6)
    whole = randomised(residual.build("full_attnres", DIM, 6, schedule="layerwise"))
    same = randomised(residual.build("full_attnres", DIM, 6, window=6))
    torch.testing.assert_close(run(same, x, layers), run(whole, x, layers), rtol=0, atol=0)
    short = randomised(residual.build("full_attnres", DIM, 6, window=2))
    state = short.start(x)
    for i, layer in enumerate(layers):
        h, state = short.read(state, i)
        state = short.write(state, i, layer(h))
    assert len(state.outputs) == 3 and short.num_sources(6) == 3
    assert short.tensor_names(state, 6) == ["output 0", "output 5", "output 6"]
    assert short.read_flops(6) == 18 * DIM and whole.read_flops(6) == 42 * DIM


@pytest.mark.parametrize("schedule", ["layerwise", "two_phase"])
def test_a_temperature_runs_on_either_schedule(schedule):
    x, layers = torch.randn(4, DIM, dtype=torch.float64), layers_of(7)
    options = dict(block_size=3, temperature=0.25)
    res = randomised(residual.build("block_attnres", DIM, 7, schedule=schedule, **options))
    plain = randomised(residual.build("block_attnres", DIM, 7, block_size=3))
    plain.pseudo_query.data.mul_(4)
    torch.testing.assert_close(run(res, x, layers), run(plain, x, layers), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("form", "parameters"),
    [
        ({}, {"pseudo_query": (7, 8), "key_norm": (7, 8)}),
        ({"query": "input"}, {"query_proj": (7, 8, 8), "key_norm": (7, 8)}),
        ({"mixing": "static"}, {"static_weight": (7, 7)}),
        ({"mixing": "static", "window": 2}, {"static_weight": (7, 3)}),
        ({"key_normalised": False}, {"pseudo_query": (7, 8)}),
        ({"heads": 4, "mixing": "sigmoid"}, {"pseudo_query": (7, 8), "key_norm": (7, 8)}),
    ],
)
def test_only_the_parameters_that_are_used_are_there(form, parameters):
    res = residual.build("full_attnres", 8, 6, **form)
    assert {name: tuple(p.shape) for name, p in res.named_parameters()} == parameters


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_depth_weights_are_those_of_the_read(form):
    res = randomised(residual.build("full_attnres", DIM, 4, **form))
    state = res.start(torch.randn(3, DIM, dtype=torch.float64))
    for i in range(4):
        state = res.write(res.read(state, i)[1], i, torch.randn(3, DIM, dtype=torch.float64))
    weights, values = res.depth_weights(state, 4), torch.stack(res.sources(state, 4))
    heads = form.get("heads", 1)
    assert weights.shape == ((5, 3) if heads == 1 else (5, 3, heads))
    h = (weights.view(5, 3, heads, 1) * values.unflatten(-1, (heads, -1))).sum(0).flatten(-2)
    torch.testing.assert_close(h, res.finish(state), rtol=1e-12, atol=1e-12)


REFUSED = [
    ({"query": "dynamic"}, "query must be one of learned, input; it is 'dynamic'"),
    ({"mixing": "relu"}, "mixing must be one of softmax, sigmoid, static; it is 'relu'"),
    ({"heads": 4}, "heads must be a positive whole number that divides the width, 6; it is 4"),
    ({"temperature": 0.0}, "temperature must be positive and finite; it is 0.0"),
    ({"temperature": float("nan")}, "temperature must be positive and finite; it is nan"),
    ({"mixing": "sigmoid", "null_source": True}, "null_source is a source of a softmax; leave it out with"),
    ({"mixing": "static", "null_source": True}, "null_source is a source of a softmax; leave it out with"),
    *(
        ({"mixing": "static", **more}, "mixing='static' has neither queries nor keys; leave " + next(iter(more)))
        for more in ({"query": "input"}, {"key_normalised": False}, {"heads": 2}, {"temperature": 2.0})
    ),
    ({"mixing": "sigmoid", "schedule": "two_phase"}, "take 'auto' with other switches, which are mixing='sigmoid'"),
]


@pytest.mark.parametrize(("name", "case"), list(itertools.product(["full_attnres", "block_attnres"], REFUSED)))
def test_what_makes_no_sense_is_refused(name, case):
    options, sentence = case
    with pytest.raises(UsageError, match=sentence):
        residual.build(name, DIM, 5, **options)


@pytest.mark.parametrize("window", [0, -1, 2.0])
def test_windows_below_one_are_refused(window):
    with pytest.raises(UsageError, match="window must be a positive whole number of layer outputs, or None; it is"):
        residual.build("full_attnres", DIM, 5, window=window)
    with pytest.raises(UsageError, match="take 'auto' with a window"):
        residual.build("full_attnres", DIM, 5, window=3, schedule="two_phase")
    with pytest.raises(UsageError, match="has no option 'window'"):
        residual.build("block_attnres", DIM, 5, window=3)
