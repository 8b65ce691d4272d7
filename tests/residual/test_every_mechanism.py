"""What every registered mechanism must do: a new one is covered as soon as it is registered."""

import copy
import inspect
import re
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from attnres import ops, residual
from attnres.analysis.measure.probe import probe
from attnres.commands.residual_flags import OPTION_HELP
from attnres.errors import UsageError
from attnres.model import Decoder, DecoderConfig

from .loop import DIM, layers_of, randomised, run

SHAPE = dict(vocab_size=31, hidden_size=16, num_attention_heads=2, intermediate_size=24, initializer_range=0.1)
IDS = torch.randint(0, 31, (2, 7), generator=torch.Generator().manual_seed(0))
VARIANTS = [
    *((name, {}) for name in residual.names()),
    ("rezero", {"input_norms": True}),
    ("laurel", {"previous": 2}),
    ("full_attnres", {"query": "input"}),
    ("full_attnres", {"mixing": "static", "window": 2}),
    ("full_attnres", {"mixing": "sigmoid", "key_normalised": False}),
    ("block_attnres", {"block_size": 2, "null_source": True, "heads": 2, "temperature": 0.5}),
    ("block_attnres", {"block_size": 2, "mixing": "static"}),
    ("full_attnres", {"schedule": "two_phase"}),
    ("block_attnres", {"num_blocks": 2, "schedule": "two_phase"}),
    ("block_attnres", {"num_blocks": 2, "schedule": "auto"}),
    *(("block_attnres", {"num_blocks": 1, "reads": reads}) for reads in ("transformer_block", 2, "block", "mlp")),
]
TWO_PHASE = [("full_attnres", {"schedule": "two_phase"}), ("block_attnres", {"num_blocks": 2, "schedule": "two_phase"})]
AS_PRENORM = {"full_attnres", "block_attnres", "laurel", "hyper_connections", "denseformer", "muddformer", "x0_lambdas"}
"""Mechanisms that are the plain sum at the start, around equal layers."""

every = pytest.mark.parametrize(("name", "options"), VARIANTS, ids=lambda v: v if isinstance(v, str) else "")


def decoder(name, options, blocks=2):
    torch.manual_seed(1)
    return Decoder(DecoderConfig(**SHAPE, num_hidden_layers=blocks, residual=name, residual_options=options))


def trained_like(model):
    """With the mechanism's parameters moved a little, so that none of them is without effect."""
    generator = torch.Generator().manual_seed(3)
    for p in model.residual.parameters():
        p.data.add_(torch.randn(p.shape, generator=generator).to(p), alpha=0.1)
    return model


def loss_of(model):
    ids = IDS.to(model.embed_tokens.weight.device)
    return F.cross_entropy(model(ids).flatten(0, 1).float(), ids.flatten())


def gradients(model):
    return torch.autograd.grad(loss_of(model), list(model.parameters()))


@every
def test_gradients_are_those_of_finite_differences(name, options):
    res = randomised(residual.build(name, 4, 3, **options))
    layers = layers_of(3, 4)
    embedding = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    leaves = (embedding, *res.parameters())
    assert torch.autograd.gradcheck(lambda *_: torch.stack(run(res, embedding, layers)), leaves, fast_mode=True)


@pytest.mark.parametrize("name", sorted(AS_PRENORM & set(residual.names())))
def test_starts_as_the_plain_sum(name):
    res = residual.build(name, DIM, 6, **residual.get(name).decoder_options).double()
    embedding = torch.randn(3, DIM, dtype=torch.float64)
    *want, last = run(residual.build("prenorm", DIM, 6), embedding, layers_of(6))
    *got, out = run(res, embedding, layers_of(6))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    # a sum over streams is larger, which the final norm takes away again
    torch.testing.assert_close(F.normalize(out, dim=-1), F.normalize(last, dim=-1), rtol=1e-12, atol=1e-12)


@every
def test_states_are_values_and_lean_ones_hold_the_same(name, options):
    res, layers = randomised(residual.build(name, DIM, 6, **options)), layers_of(6)
    embedding = torch.randn(3, DIM, dtype=torch.float64)
    want = run(res, embedding, layers)
    res.lean = True
    state = res.start(embedding)
    for i, layer in enumerate(layers):
        tensors = [leaf for leaf in pytree.tree_leaves(state) if leaf is not None]
        assert all(isinstance(leaf, torch.Tensor) and leaf.shape[:1] == (3,) for leaf in tensors)
        before = [leaf.clone() for leaf in tensors]
        names = res.tensor_names(state, i)
        assert len(set(names)) == len(names) == len(tensors)
        h, after = res.read(state, i)
        torch.testing.assert_close(h, want[i], rtol=1e-12, atol=1e-12)
        assert torch.equal(res.read(state, i)[0], h)
        written = res.write(after, i, layer(h))
        assert all(torch.equal(a, b) for a, b in zip(before, tensors, strict=True)), "a state is never changed"
        assert res.latest(written).shape[0] == 3
        state = written
    torch.testing.assert_close(res.finish(state), want[-1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(("name", "options"), [*VARIANTS, *TWO_PHASE], ids=lambda v: v if isinstance(v, str) else "")
def test_no_output_is_lost_where_a_layer_writes_before_it_reads(name, options, grad, lean):
    """Two writes in a row are refused, or are what they would be with a read between them."""
    res, layers = randomised(residual.build(name, DIM, 6, **options)), layers_of(6)
    res.lean = lean
    states = [res.start(torch.randn(3, DIM, dtype=torch.float64))]
    with torch.set_grad_enabled(grad):
        for i, layer in enumerate(layers):
            h, read = res.read(states[i], i)
            states.append(res.write(read, i, layer(h)))
        for i in range(4):
            output = torch.randn(3, DIM, dtype=torch.float64)
            want = res.read(res.write(res.read(states[i + 1], i + 1)[1], i + 1, output), i + 2)[0]
            try:
                written = res.write(states[i + 1], i + 1, output)
                torch.testing.assert_close(res.read(written, i + 2)[0], want, rtol=1e-12, atol=1e-12)
            except UsageError as error:
                assert f"layer {i + 1} may not write now" in str(error) or f"layer {i + 2} may not read" in str(error)


@pytest.mark.parametrize(("name", "options"), TWO_PHASE, ids=lambda v: v if isinstance(v, str) else "")
def test_two_phase_reads_out_of_turn_are_refused(name, options):
    """Phase 1's results are handed out in turn: a layer that comes too early would get those of the one before."""
    res = residual.build(name, DIM, 6, **options)
    with torch.no_grad():
        first, state = res.read(res.start(torch.randn(3, DIM)), 0)
        h, state = res.read(res.write(state, 0, first), 1)
        with pytest.raises(UsageError, match="layer 2 may not read now"):
            res.read(state, 2)
        state = res.write(state, 1, h)
        with pytest.raises(UsageError, match="layer 1 may not read now"):
            res.read(state, 1)


@pytest.mark.parametrize(("name", "options"), TWO_PHASE, ids=lambda v: v if isinstance(v, str) else "")
def test_a_network_may_end_early(name, options):
    """The output read after any layer, in the middle of a block too, as drafts of self-speculation have it."""
    res, layers = randomised(residual.build(name, DIM, 6, **options)), layers_of(6)
    layerwise = copy.deepcopy(res)
    layerwise.schedule = "layerwise"
    embedding = torch.randn(3, DIM, dtype=torch.float64)
    ends = []
    for mechanism in (res, layerwise):
        state, found = mechanism.start(embedding), []
        for i, layer in enumerate(layers):
            found.append(mechanism.finish(state))
            h, state = mechanism.read(state, i)
            state = mechanism.write(state, i, layer(h))
        ends.append(found)
    torch.testing.assert_close(*ends, rtol=1e-12, atol=1e-12)


@every
def test_stages_share_out_the_parameters_and_make_the_whole(name, options):
    whole, layers = randomised(residual.build(name, DIM, 6, **options)), layers_of(6)
    whole.lean = True
    embedding = torch.randn(3, DIM, dtype=torch.float64)
    state, held = whole.start(embedding), 0
    for first, last in ((0, 1), (1, 4), (4, 6)):
        stage = copy.deepcopy(whole)
        stage.keep_layers(first, last)
        held += sum(p.numel() for p in stage.parameters())
        for i in range(first, last):
            h, state = stage.read(state, i)
            state = stage.write(state, i, layers[i](h))
    assert held == sum(p.numel() for p in whole.parameters())
    torch.testing.assert_close(stage.finish(state), run(whole, embedding, layers)[-1], rtol=1e-12, atol=1e-12)


@every
def test_a_stage_resets_its_own_layers(name, options):
    res = residual.build(name, DIM, 6, **options).double()
    res.reset_parameters()
    fresh = {key: value.clone() for key, value in res.named_parameters()}
    randomised(res).keep_layers(2, 5)
    keys = list(res.state_dict())
    res.reset_parameters()
    assert list(res.state_dict()) == keys and all(p.requires_grad for p in res.parameters())
    for key, value in res.named_parameters():
        parent, _, layer = key.rpartition(".")
        want = fresh[key] if key in fresh else fresh[parent][int(layer)]
        if not (name == "gated_residual" or key.startswith("down")):  # drawn at random
            assert torch.equal(value, want.to(value)), key
        assert value.isfinite().all() and value.abs().max() <= 8.0


@every
def test_checkpointing_gives_the_same_gradients(name, options):
    model = trained_like(decoder(name, options)).double()
    plain = gradients(model)
    assert all(g.isfinite().all() and g.any() for g in plain)
    model.enable_checkpointing()
    torch.testing.assert_close(gradients(model), plain, rtol=1e-11, atol=1e-13)


@every
def test_compiles_in_one_graph(name, options):
    model = trained_like(decoder(name, options, blocks=1))
    want, want_gradients = model(IDS), gradients(model)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(IDS), want)
    loss = F.cross_entropy(compiled(IDS).flatten(0, 1), IDS.flatten())
    torch.testing.assert_close(torch.autograd.grad(loss, list(model.parameters())), want_gradients)


@every
def test_layers_that_hand_one_tensor_on_compile(name, options):
    """A layer without effect, and two layers with one output: a mechanism then keeps the same tensor twice."""
    res = randomised(residual.build(name, DIM, 6, **options))
    embedding = torch.randn(2, 3, DIM, dtype=torch.float64, requires_grad=True)
    other = torch.randn(2, 3, DIM, dtype=torch.float64, requires_grad=True)
    layers = [lambda h: h, lambda h: other, lambda h: other, torch.tanh, torch.zeros_like, lambda h: h]
    tensors = (embedding, other, *res.parameters())

    def last(*_):
        return run(res, embedding, layers)[-1]

    torch.compiler.reset()
    want, got = last(), torch.compile(last, fullgraph=True, backend="eager")()
    torch.testing.assert_close(got, want)
    gradients = [torch.autograd.grad(h.sin().sum(), tensors, materialize_grads=True) for h in (got, want)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("name", [n for n in residual.names() if n not in ("full_attnres", "block_attnres")])
def test_runs_on_the_triton_kernels(name, device):
    """In Triton's interpreter where there is no GPU; those of AttnRes itself have tests of their own."""
    pytest.importorskip("triton")
    model, ids = trained_like(decoder(name, {}, blocks=1)).to(device), IDS.to(device)
    before, found = ops.backend(), {}
    try:
        for backend in ("eager", "triton"):
            ops.set_backend(backend)
            found[backend] = model(ids), gradients(model)
    finally:
        ops.set_backend(before)
    (logits, model_gradients), (want, want_gradients) = found["triton"], found["eager"]
    torch.testing.assert_close(logits, want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model_gradients, want_gradients, rtol=1e-3, atol=1e-4)


@every
@pytest.mark.parametrize("autocast", [True, False])
def test_bfloat16_is_close_to_float32(name, options, autocast):
    model = trained_like(decoder(name, options))
    want = model(IDS).detach()
    if not autocast:
        model = model.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = model(IDS)
        assert all(g.isfinite().all() for g in gradients(model))
    assert (logits.float() - want).norm() < 0.05 * want.norm()
    model.residual.lean = True
    state = model.residual.start(torch.zeros(2, 16, dtype=torch.bfloat16))
    h, state = model.residual.read(state, 0)
    state = model.residual.write(state, 0, h)
    dtypes = {leaf.dtype for leaf in pytree.tree_leaves(state) if leaf is not None}
    assert h.dtype == torch.bfloat16 and dtypes == {torch.bfloat16}, "states travel in the dtype of the stream"


@every
def test_training_moves_every_parameter_and_lowers_the_loss(name, options):
    model = decoder(name, options)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    losses = []
    for _ in range(6):
        loss = loss_of(model)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    still = [n for n, p in model.named_parameters() if torch.equal(p, start[n])]
    assert not still, f"nothing moves {still}"


@every
def test_initial_values_follow_the_seed_and_nothing_else(name, options):
    config = DecoderConfig(**SHAPE, num_hidden_layers=2, residual=name, residual_options=options)
    torch.manual_seed(1)
    one = Decoder(config, seed=4)
    torch.manual_seed(2)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), Decoder(config, seed=4).parameters(), strict=True))
    assert config.parameter_counts()["total"] == sum(p.numel() for p in one.parameters())


@every
def test_costs_are_counted(name, options):
    res = residual.build(name, DIM, 6, **options)
    flops = [res.read_flops(layer) for layer in range(7)]
    assert all(isinstance(f, int) and f >= 0 for f in flops)
    assert any(flops) or not list(res.parameters()), "what has parameters computes with them"


@every
def test_can_be_probed(name, options):
    seen = probe(decoder(name, options), [(IDS[:, :-1], IDS[:, 1:])])
    assert len(seen["output_magnitude"]) == len(seen["gradient_magnitude"]) == 2
    assert all(0 < x < float("inf") for x in (*seen["output_magnitude"], *seen["gradient_magnitude"]))


@pytest.mark.parametrize("name", residual.names())
def test_sizes_are_checked_and_every_option_is_described(name):
    for sizes in ((0, 4), (4, 0), (4.0, 4)):
        with pytest.raises(UsageError, match="must be a positive whole number"):
            residual.build(name, *sizes)
    cls = residual.get(name)
    for option in list(inspect.signature(cls.__init__).parameters)[3:]:
        described = re.search(OPTION_HELP % option, inspect.getdoc(cls), re.DOTALL | re.MULTILINE)
        assert described, f"the command line has no help for {option}"


@pytest.mark.parametrize("name", residual.names())
def test_has_a_row_on_the_page_one_chooses_by(name):
    page = (Path(__file__).parents[2] / "docs" / "mechanisms.md").read_text()
    assert f"\n| `{name}` |" in page, f"docs/mechanisms.md has no row for {name}"
