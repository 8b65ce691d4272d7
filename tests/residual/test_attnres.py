"""Full and Block AttnRes as residual objects: the paper's definitions written out, schedules, the state as a value."""

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

import attnres
from attnres import residual
from attnres.errors import UsageError

DIM = 12


def run(res, embedding, layers, norms=None):
    state, inputs = res.start(embedding), []
    for i, layer in enumerate(layers):
        h, state = res.read(state, i, None if norms is None else norms[i])
        inputs.append(h)
        state = res.write(state, i, layer(h))
    inputs.append(res.finish(state, None if norms is None else norms[-1]))
    return inputs


def layers_of(count):
    torch.manual_seed(count)
    return nn.ModuleList(nn.Sequential(nn.Linear(DIM, DIM), nn.Tanh()) for _ in range(count)).double()


def randomised(res):
    torch.manual_seed(5)
    for p in res.parameters():
        nn.init.normal_(p)
    return res.double()


def written_out(res, embedding, layers, starts, scale):
    """Sections 2 and 3 of the paper, one read at a time; starts[n] is the first layer of block n (None: Full)."""

    def read(sources, row):
        values = torch.stack(sources)
        keys = values * torch.rsqrt(values.square().mean(-1, keepdim=True) + res.eps) * res.key_norm[row]
        h = ((keys @ res.pseudo_query[row]).softmax(0).unsqueeze(-1) * values).sum(0)
        return h * len(sources) if scale else h

    blocks, partial, inputs = [embedding], None, []
    for i, layer in enumerate(layers):
        if partial is not None and (starts is None or i in starts):
            blocks, partial = [*blocks, partial], None
        inputs.append(read(blocks if partial is None else [*blocks, partial], i))
        output = layer(inputs[-1])
        partial = output if partial is None else partial + output
    inputs.append(read([*blocks, partial], len(layers)))
    return inputs


CASES = [
    ("full_attnres", 7, {}, None),
    ("full_attnres", 1, {}, None),
    ("block_attnres", 9, {"num_blocks": 3}, (0, 3, 6)),
    ("block_attnres", 11, {"num_blocks": 3}, (0, 3, 6)),  # the last block takes the remainder
    ("block_attnres", 7, {"block_size": 3}, (0, 3, 6)),  # the last block is what is left
    ("block_attnres", 7, {"num_blocks": 1}, (0,)),
    ("block_attnres", 6, {"num_blocks": 6}, None),
    ("block_attnres", 6, {"block_size": 1}, None),
    ("block_attnres", 4, {"block_size": 9}, (0,)),
    ("block_attnres", 5, {}, None),  # default of eight blocks, clipped to the layers there are
]


@pytest.mark.parametrize("schedule", ["layerwise", "two_phase", "auto"])
@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize(("name", "count", "options", "starts"), CASES)
def test_every_read_and_gradient_is_the_papers(name, count, options, starts, scale, schedule):
    res = randomised(residual.build(name, DIM, count, stream_scale=scale, schedule=schedule, **options))
    layers = layers_of(count)
    embedding = torch.randn(2, 5, DIM, dtype=torch.float64, requires_grad=True)
    got, want = run(res, embedding, layers), written_out(res, embedding, layers, starts, scale)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-12, atol=1e-12)
    leaves = [embedding, *res.parameters(), *layers.parameters()]
    direction = [torch.randn_like(w) for w in want]
    for g, w in zip(
        torch.autograd.grad(got, leaves, direction), torch.autograd.grad(want, leaves, direction), strict=True
    ):
        torch.testing.assert_close(g, w, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "options"),
    [(name, {}) for name in residual.names()]
    + [
        (name, {"stream_scale": True, "schedule": schedule})
        for name in ("full_attnres", "block_attnres")
        for schedule in ("layerwise", "two_phase")
    ],
)
def test_norm_handed_to_read_is_applied(name, options):
    count = 6
    res, layers = randomised(residual.build(name, DIM, count, **options)), layers_of(count)
    norms = nn.ModuleList(nn.RMSNorm(DIM, 0.1) for _ in range(count + 1)).double()  # an eps that matters
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.5, 2)
    embedding = torch.randn(4, DIM, dtype=torch.float64)
    folded = run(res, embedding, layers, norms)
    plain = run(res, embedding, [nn.Sequential(n, f) for n, f in zip(norms, layers, strict=False)])
    for x, h, norm in zip(folded, plain, norms, strict=True):
        torch.testing.assert_close(x, norm(h), rtol=1e-12, atol=1e-12)
    seen = []
    norms[2].register_forward_hook(lambda module, args, out: seen.append(out))
    run(res, embedding, layers, norms)
    assert len(seen) == 1, "a norm that someone watches is called, not folded"
    norms[3].register_full_backward_pre_hook(lambda module, gradient: seen.append(gradient))
    norms[4].register_full_backward_hook(lambda module, gradient, output: seen.append(gradient))
    norms[5].forward = lambda h: seen.append(h) or h
    run(res, embedding.requires_grad_(), layers, norms)[-1].sum().backward()
    assert len(seen) == 5


@pytest.mark.parametrize("schedule", ["layerwise", "two_phase"])
@pytest.mark.parametrize("name", ["full_attnres", "block_attnres"])
def test_depth_weights_are_those_of_the_read(name, schedule):
    count = 6
    options = {"num_blocks": 2} if name == "block_attnres" else {}
    res, layers = randomised(residual.build(name, DIM, count, schedule=schedule, **options)), layers_of(count)
    state = res.start(torch.randn(3, DIM, dtype=torch.float64))
    for i in range(count + 1):
        weights, sources = res.depth_weights(state, i), res.sources(state, i)
        assert weights.shape == (res.num_sources(i), 3) and len(sources) == res.num_sources(i)
        torch.testing.assert_close(weights.sum(0), torch.ones(3, dtype=torch.float64))
        h = res.finish(state) if i == count else res.read(state, i)[0]
        torch.testing.assert_close(h, sum(w.unsqueeze(-1) * v for w, v in zip(weights, sources, strict=True)))
        if i < count:
            h, state = res.read(state, i)
            state = res.write(state, i, layers[i](h))


@pytest.mark.parametrize("name", residual.names())
def test_state_is_an_immutable_pytree(name):
    res, layers = randomised(residual.build(name, DIM, 4)), layers_of(4)
    state = res.start(torch.randn(3, DIM, dtype=torch.float64))
    h, state = res.read(state, 0)
    state = res.write(state, 0, layers[0](h))
    leaves, spec = pytree.tree_flatten(state)
    before = [leaf.clone() for leaf in leaves if leaf is not None]
    again = pytree.tree_unflatten(leaves, spec)
    first = res.read(state, 1)[0]
    res.write(res.read(state, 1)[1], 1, torch.ones_like(h))
    torch.testing.assert_close(res.read(again, 1)[0], first, rtol=0, atol=0)
    assert all(torch.equal(b, leaf) for b, leaf in zip(before, [x for x in leaves if x is not None], strict=True))
    with pytest.raises(AttributeError):
        state.blocks = ()


@pytest.mark.parametrize("schedule", ["layerwise", "two_phase"])
@pytest.mark.parametrize("lean", [False, True])
def test_checkpointed_steps_give_identical_gradients(schedule, lean):
    res, layers = randomised(attnres.BlockAttnRes(DIM, 6, num_blocks=2, schedule=schedule)), layers_of(6)
    res.lean = lean
    embedding = torch.randn(3, DIM, dtype=torch.float64, requires_grad=True)

    def step(state, i):
        h, state = res.read(state, i)
        return res.write(state, i, layers[i](h))

    def loss(call):
        state = res.start(embedding)
        for i in range(6):
            state = call(step, state, i)
        return res.finish(state).square().sum()

    leaves = [embedding, *res.parameters(), *layers.parameters()]
    plain = torch.autograd.grad(loss(lambda f, *a: f(*a)), leaves)
    kept = torch.autograd.grad(loss(lambda f, *a: checkpoint(f, *a, use_reentrant=False)), leaves)
    assert all(torch.equal(a, b) for a, b in zip(plain, kept, strict=True))


def test_a_lean_state_holds_blocks_and_one_partial_sum_only():
    res, layers = attnres.BlockAttnRes(DIM, 6, num_blocks=2), layers_of(6).float()
    res.lean = True
    state = res.start(torch.randn(3, DIM))
    for i in range(6):
        h, state = res.read(state, i)
        state = res.write(state, i, layers[i](h))
        assert len([x for x in pytree.tree_leaves(state) if x is not None]) == 1 + i // 3 + 1


def test_parameters_are_the_promised_ones():
    for res in (attnres.FullAttnRes(DIM, 6), attnres.BlockAttnRes(DIM, 6)):
        assert {n: tuple(p.shape) for n, p in res.named_parameters()} == {
            "pseudo_query": (7, DIM),
            "key_norm": (7, DIM),
        }
        assert not res.pseudo_query.any() and (res.key_norm == 1).all()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("blok_attnres", {}, "did you mean 'block_attnres'"),
        ("block_attnres", {"block_size": 2, "num_blocks": 2}, "block_size or num_blocks, not both"),
        ("block_attnres", {"block_size": 0}, "block_size must be a positive"),
        ("block_attnres", {"num_blocks": -1}, "num_blocks must be a positive"),
        ("block_attnres", {"num_blocks": 9}, "at most the number of layers, 6"),
        ("block_attnres", {"blocks": 2}, "no option 'blocks'; it takes block_size, num_blocks"),
        ("prenorm", {"num_blocks": 2}, "no option 'num_blocks'; it takes none"),
        ("full_attnres", {"schedule": "fast"}, "schedule must be one of"),
        ("full_attnres", {"eps": -1e-6}, "eps must be zero or positive"),
    ],
)
def test_bad_options_are_named(name, options, message):
    with pytest.raises(UsageError, match=message):
        residual.build(name, DIM, 6, **options)


def test_a_name_is_registered_once():
    with pytest.raises(ValueError, match="already registered"):
        residual.register("prenorm")(residual.PreNorm)
