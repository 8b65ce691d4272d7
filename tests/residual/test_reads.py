"""Block AttnRes that not every layer reads: the others see the newest read plus what was added since, or the sum."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from attnres import ops, residual
from attnres.errors import UsageError

from .loop import DIM, layers_of, randomised, rms_norm, run

CASES = [
    # layers, options, first layers of the blocks, layers that read
    (8, {"block_size": 4, "reads": "transformer_block"}, (0, 4), {0, 2, 4, 6}),
    (8, {"block_size": 4, "reads": 4}, (0, 4), {0, 4}),
    (11, {"num_blocks": 2, "reads": "block"}, (0, 5), {0, 5}),
    (11, {"block_size": 6, "reads": 3}, (0, 6), {0, 3, 6, 9}),
    (7, {"block_size": 2, "reads": 2}, (0, 2, 4, 6), {0, 2, 4, 6}),
    (6, {"num_blocks": 1, "reads": "transformer_block"}, (0,), {0, 2, 4}),
    (8, {"block_size": 4, "reads": "mlp"}, (0, 4), {1, 3, 5, 7}),
    (9, {"block_size": 2, "reads": "mlp"}, (0, 2, 4, 6, 8), {1, 3, 5, 7}),
]
every = pytest.mark.parametrize(("count", "options", "starts", "readers"), CASES)
SCHEDULES = pytest.mark.parametrize("schedule", ["layerwise", "two_phase", "auto"])


def build(count, options, schedule="layerwise", scale=True):
    return residual.build("block_attnres", DIM, count, **options, schedule=schedule, stream_scale=scale).double()


def written_out(res, embedding, layers, starts, readers, scale=True):
    """What every layer and the output head see."""
    inputs, outputs, stream = [], [], embedding
    ends = [*starts[1:], len(layers)]
    for i in range(len(layers) + 1):
        if i in readers or i == len(layers):
            blocks = [outputs[a : min(b, i)] for a, b in zip(starts, ends, strict=True) if a < i]
            v = torch.stack([embedding, *map(sum, blocks)])
            weights = (res.pseudo_query[i] * rms_norm(v, res.key_norm[i])).sum(-1, keepdim=True).softmax(0)
            stream = (weights * v).sum(0) * (len(v) if scale else 1)
        elif res.reads == "mlp":
            stream = sum(outputs, embedding)
        else:
            stream = stream + outputs[-1]
        inputs.append(stream)
        if i < len(layers):
            outputs.append(layers[i](stream))
    return inputs


@SCHEDULES
@pytest.mark.parametrize("scale", [False, True])
@every
def test_every_input_and_gradient_is_the_formula(count, options, starts, readers, scale, schedule):
    res, layers = randomised(build(count, options, schedule, scale)), layers_of(count)
    embedding = torch.randn(2, 3, DIM, dtype=torch.float64, requires_grad=True)
    leaves = [embedding, *res.parameters(), *layers.parameters()]
    want = written_out(res, embedding, layers, starts, readers, scale)
    direction = [torch.randn_like(h) for h in want]
    gradients = torch.autograd.grad(want, leaves, direction)
    for res.lean in (False, True):
        got = run(res, embedding, layers)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(torch.autograd.grad(got, leaves, direction), gradients, rtol=1e-9, atol=1e-10)
        with torch.no_grad():
            torch.testing.assert_close(run(res, embedding, layers), want, rtol=1e-12, atol=1e-12)


@SCHEDULES
@every
def test_zero_queries_are_prenorm(count, options, starts, readers, schedule):
    embedding, layers = torch.randn(3, DIM, dtype=torch.float64), layers_of(count)
    want = run(residual.build("prenorm", DIM, count), embedding, layers)
    torch.testing.assert_close(run(build(count, options, schedule), embedding, layers), want, rtol=1e-10, atol=1e-10)


@every
def test_norms_are_applied_to_what_a_layer_sees_and_not_to_the_stream(count, options, starts, readers):
    res, layers = randomised(build(count, options)), layers_of(count)
    norms = [nn.RMSNorm(DIM, eps=1e-6).double() for _ in range(count + 1)]
    embedding = torch.randn(3, DIM, dtype=torch.float64)
    want = written_out(
        res, embedding, [nn.Sequential(*pair) for pair in zip(norms, layers, strict=False)], starts, readers
    )
    state = res.start(embedding)
    for i, layer in enumerate(layers):
        x, state = res.read(state, i, norms[i])
        torch.testing.assert_close(x, norms[i](want[i]), rtol=1e-12, atol=1e-12)
        state = res.write(state, i, layer(x))
    torch.testing.assert_close(res.finish(state, norms[-1]), norms[-1](want[-1]), rtol=1e-12, atol=1e-12)


def test_a_read_in_front_of_every_layer_is_what_it_was():
    torch.manual_seed(0)
    embedding, layers = torch.randn(3, DIM, dtype=torch.float64, requires_grad=True), layers_of(8)
    found = []
    for reads in ({}, {"reads": "layer"}, {"reads": 1}):
        res = randomised(residual.build("block_attnres", DIM, 8, block_size=4, **reads))
        inputs = run(res, embedding, layers)
        found.append([*inputs, *torch.autograd.grad(sum(h.sum() for h in inputs), [embedding, *res.parameters()])])
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_a_lean_state_carries_the_stream_only_between_reads():
    res = build(8, {"block_size": 4, "reads": "transformer_block"})
    res.lean = True
    state = res.start(torch.zeros(3, DIM, dtype=torch.float64))
    names = []
    for i in range(8):
        names.append(res.tensor_names(state, i))
        assert len([leaf for leaf in pytree.tree_leaves(state) if leaf is not None]) == len(names[-1])
        h, state = res.read(state, i)
        state = res.write(state, i, h)
    assert names[1] == ["block 0", "partial 1", "stream 1"] and names[2] == ["block 0", "partial 2"]
    assert names[4] == ["block 0", "block 1"] and names[7] == ["block 0", "block 1", "partial 7", "stream 7"]


@every
def test_rows_of_layers_without_a_read_have_no_effect_and_no_gradient(count, options, starts, readers):
    res, layers = randomised(build(count, options)), layers_of(count)
    assert res.pseudo_query.shape == res.key_norm.shape == (count + 1, DIM)
    run(res, torch.randn(3, DIM, dtype=torch.float64), layers)[-1].sum().backward()
    for layer in range(count):
        reads = layer in readers and layer > 0
        assert bool(res.pseudo_query.grad[layer].any()) == reads and bool(res.key_norm.grad[layer].any()) == reads
        assert (res.num_sources(layer) > 0) == (layer in readers) == res.reads_depth(layer)
        flops = 6 * DIM * res.num_sources(layer) if reads else 0 if layer in readers else DIM
        assert res.read_flops(layer) == flops


def test_a_stage_trains_though_some_of_its_rows_have_no_gradient():
    res, layers = build(8, {"block_size": 4, "reads": "transformer_block"}), layers_of(8)
    res.keep_layers(0, 8)
    optimizer = torch.optim.AdamW(res.parameters(), lr=0.1, weight_decay=0.1)
    run(res, torch.randn(3, DIM, dtype=torch.float64), layers)[-1].square().sum().backward()
    assert getattr(res.pseudo_query, "3").grad is None and getattr(res.pseudo_query, "2").grad is not None
    optimizer.step()
    assert not res.row("pseudo_query", 3).any() and res.row("pseudo_query", 2).any()


def test_a_layer_without_a_read_has_no_weights():
    res = build(8, {"block_size": 4, "reads": "transformer_block"})
    state = res.start(torch.zeros(3, DIM, dtype=torch.float64))
    assert res.depth_weights(res.write(res.read(state, 0)[1], 0, state.blocks[0]), 1).shape == (0, 3)


@pytest.mark.parametrize("reads", ["transformer_block", "mlp"])
@pytest.mark.parametrize("schedule", ["layerwise", "two_phase"])
def test_runs_on_the_triton_kernels(reads, schedule, device):
    """In Triton's interpreter where there is no GPU."""
    pytest.importorskip("triton")
    res = residual.build("block_attnres", 16, 8, block_size=4, reads=reads, schedule=schedule, stream_scale=True)
    torch.manual_seed(2)
    for p in res.to(device).parameters():
        nn.init.normal_(p)
    norm = nn.RMSNorm(16).to(device)
    embedding = torch.randn(3, 16, device=device, requires_grad=True)
    before, found = ops.backend(), {}
    try:
        for backend in ("eager", "triton"):
            ops.set_backend(backend)
            state = res.start(embedding)
            for i in range(8):
                x, state = res.read(state, i, norm)
                state = res.write(state, i, F.silu(x))
            h = res.finish(state, norm)
            found[backend] = [h, *torch.autograd.grad(h.sin().sum(), [embedding, *res.parameters()])]
    finally:
        ops.set_backend(before)
    torch.testing.assert_close(found["triton"], found["eager"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reads": "blocks"}, "reads must be one of 'layer', 'transformer_block', 'mlp', 'block' or a positive whole"),
        ({"reads": "2"}, "reads must be one of .*; it is '2'"),
        ({"reads": 0, "block_size": 4}, "positive whole number of layers; it is 0"),
        ({"reads": True, "block_size": 4}, "positive whole number of layers; it is True"),
        ({"reads": 3, "block_size": 4}, "every 3 layers, does not divide the blocks, which start at layers 0, 4 of 8"),
        ({"reads": 8, "block_size": 4}, "reads=8, every 8 layers, does not divide"),
        ({"reads": 9, "num_blocks": 1}, "reads=9, every 9 layers, does not divide"),
        ({"reads": "transformer_block", "block_size": 3}, "reads='transformer_block', every 2 layers, does not divide"),
        ({"reads": "mlp", "num_blocks": 8}, "reads='mlp', every 2 layers, does not divide"),
        ({"reads": "block", "num_blocks": 8}, "reads='block' with blocks of one layer is reads='layer'"),
    ],
)
def test_reads_that_make_no_sense_are_named(options, message):
    with pytest.raises(UsageError, match=message):
        residual.build("block_attnres", DIM, 8, **options)
