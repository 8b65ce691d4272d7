"""Kimi Delta Attention: both forms of the delta rule against a loop over tokens, the layer in pieces and in packs."""

import subprocess
import sys
from math import inf
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from attnres.errors import UsageError
from attnres.model.layers.delta_rule import FLA_INSTALLED, SPAN, chunked, delta_rule, fused, recurrent
from attnres.model.layers.kda import KDAState, KimiDeltaAttention

from ..device import needs_gpu

NAMES = ("q", "k", "v", "g", "beta", "initial_state")


def inputs(tokens, batch=2, heads=2, keys=6, values=5, decay=1.0, dtype=torch.float64, states=None, seed=0):
    """q, k of length one, v, g in (-2 decay, 0), beta in (0, 1), initial state."""
    torch.manual_seed(seed)
    q, k, g = torch.randn(3, batch, tokens, heads, keys, dtype=torch.float64).unbind()
    v = torch.randn(batch, tokens, heads, values, dtype=torch.float64)
    beta = torch.rand(batch, tokens, heads, dtype=torch.float64)
    state = torch.randn(states or batch, heads, keys, values, dtype=torch.float64)
    made = F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, -2 * decay * g.sigmoid(), beta, state
    return [x.to(dtype).requires_grad_() for x in made]


def loop(q, k, v, g, beta, state):
    """The definition, for one sequence and head at a time."""
    o, finals = torch.empty_like(v), torch.empty_like(state)
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            S = state[b, h]
            for t in range(q.shape[1]):
                S = torch.diag(g[b, t, h].exp()) @ S
                S = S + beta[b, t, h] * torch.outer(k[b, t, h], v[b, t, h] - S.T @ k[b, t, h])
                o[b, t, h] = S.T @ q[b, t, h] / q.shape[-1] ** 0.5
            finals[b, h] = S
    return o, finals


def with_gradients(form, arguments, **more):
    """Output, final state, and the gradients of every argument through both."""
    o, state = form(*arguments, **more)
    weights = torch.linspace(-1, 2, o.numel()).to(o).view_as(o), torch.linspace(1, -1, state.numel()).to(state)
    loss = (o * weights[0]).sum() + (state.flatten() * weights[1]).sum()
    return o, state, *torch.autograd.grad(loss, arguments)


def assert_equal(got, expected, tolerance=1e-10):
    for name, a, b in zip(("o", "final state", *NAMES), got, expected, strict=False):
        assert a.isfinite().all(), name
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("form", [recurrent, chunked, delta_rule])
def test_forms_are_the_definition(form):
    with torch.no_grad():
        assert_equal(form(*inputs(21)), loop(*inputs(21)))


@pytest.mark.parametrize("tokens", [1, 5, 63, 64, 65, 200])
@pytest.mark.parametrize("decay", [0.02, 1.0, 50.0])
def test_chunks_are_the_recurrence_with_all_gradients(tokens, decay):
    assert_equal(with_gradients(chunked, inputs(tokens, decay=decay)),
                 with_gradients(recurrent, inputs(tokens, decay=decay)))  # fmt: skip


@pytest.mark.parametrize("chunk_size", [1, 2, 8, 32, 128])
def test_so_they_are_for_every_size(chunk_size):
    expected = with_gradients(recurrent, inputs(37))
    assert_equal(with_gradients(chunked, inputs(37), chunk_size=chunk_size), expected)


@pytest.mark.parametrize("tokens", [64, 65, 130])
def test_so_they_are_over_several_spans_of_chunks(tokens):
    assert tokens >= SPAN * 4
    expected = with_gradients(recurrent, inputs(tokens))
    assert_equal(with_gradients(chunked, inputs(tokens), chunk_size=4), expected)


@pytest.mark.parametrize("pattern", ["every token", "some tokens", "some channels", "to nothing"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_strong_decay_neither_overflows_nor_loses_the_state(pattern, dtype):
    arguments = inputs(100, decay=0.01, dtype=dtype)
    with torch.no_grad():
        g = arguments[3]
        if pattern == "every token":
            g.fill_(-50.0)
        elif pattern == "some tokens":
            g[:, 10::30] = -50.0
        elif pattern == "some channels":
            g[..., ::2] = -50.0
        else:
            g[:, 40], g[..., 1] = -1e4, -1e30
    expected = with_gradients(recurrent, [x.detach().double().requires_grad_() for x in arguments])
    got = with_gradients(chunked, arguments)
    assert_equal([x.double() for x in got], expected, 1e-10 if dtype == torch.float64 else 2e-5)
    assert pattern == "every token" or got[1].abs().max() > 0.1


def test_small_decay_after_strong_decay_keeps_its_digits():
    """Subtracting sums of about -6400 would leave an exponent of 0.001 with an error of a half in fp32."""
    arguments = inputs(64, dtype=torch.float32)
    with torch.no_grad():
        arguments[3][:, :32], arguments[3][:, 32:] = -2e5, -1e-3
        expected = recurrent(*(x.double() for x in arguments))
        assert_equal([x.double() for x in chunked(*arguments)], expected, 1e-6)


@pytest.mark.parametrize("form", [recurrent, chunked])
def test_gradcheck(form):
    torch.autograd.gradcheck(lambda *x: form(*x), inputs(5, batch=1, heads=1, keys=2, values=3))


@pytest.mark.parametrize("form", [recurrent, chunked])
def test_the_final_state_is_where_the_next_piece_starts(form):
    *tokens, state = inputs(90)
    expected = form(*tokens, state)
    outputs = []
    for piece in zip(*(x.split([1, 40, 1, 48], 1) for x in tokens), strict=True):
        o, state = form(*piece, state)
        outputs.append(o)
    assert_equal([torch.cat(outputs, 1), state], expected)
    assert_equal(form(*tokens), form(*tokens, torch.zeros_like(state)))


@pytest.mark.parametrize("form", [recurrent, chunked])
@pytest.mark.parametrize("lengths", [[70, 1, 0, 64, 13], [0, 5], [33]])
def test_packed_sequences_do_not_see_each_other(form, lengths):
    arguments = inputs(sum(lengths), batch=1, states=len(lengths))
    borders = torch.tensor([0, *lengths]).cumsum(0)

    def apart(*given):
        pieces = zip(*(x.split(lengths, 1) for x in given[:5]), given[5].split(1), strict=True)
        results = [recurrent(*piece) if piece[0].shape[1] else (piece[2], piece[5]) for piece in pieces]
        return tuple(torch.cat(parts, dim) for parts, dim in zip(zip(*results, strict=True), (1, 0), strict=True))

    assert_equal(with_gradients(form, arguments, cu_seqlens=borders), with_gradients(apart, arguments))
    assert_equal(form(*arguments[:5], cu_seqlens=borders), apart(*arguments[:5], torch.zeros_like(arguments[5])))


def test_half_precision_costs_no_more_than_in_the_recurrence():
    """Both widen inside, so only the rounding of inputs and outputs is left."""
    exact = inputs(150, keys=32, values=32)
    rounded = [x.detach().bfloat16().requires_grad_() for x in exact]
    truth = with_gradients(recurrent, [x.detach().double().requires_grad_() for x in rounded])

    def errors(form):
        found = with_gradients(form, rounded)
        assert found[0].dtype == torch.bfloat16 and found[1].dtype == torch.float32
        return [float((a.double() - b).detach().norm() / b.detach().norm()) for a, b in zip(found, truth, strict=True)]

    for chunk, token in zip(errors(chunked), errors(recurrent), strict=True):
        assert chunk < max(2 * token, 1e-6) and chunk < 0.01


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chunk_size": 48}, "chunk_size must be a power of two, such as 64; it is 48"),
        ({"chunk_size": 0}, "chunk_size must be a power of two"),
        ({"q": torch.ones(2, 9, 2)}, r"q and v must be \[batch, tokens, heads, width\]"),
        ({"k": torch.ones(2, 9, 2, 7)}, r"k must have the shape of q, \[2, 9, 2, 6\]; it is \[2, 9, 2, 7\]"),
        ({"g": torch.ones(2, 9, 2, 1)}, "g must have the shape of q"),
        ({"v": torch.ones(2, 8, 2, 5)}, "v must have the shape of q but for its width"),
        ({"beta": torch.ones(2, 9)}, r"beta must have the shape of q without its width, \[2, 9, 2\]"),
        ({"initial_state": torch.ones(2, 2, 5, 6)}, r"initial_state must be \[2, 2, 6, 5\]"),
        ({"cu_seqlens": torch.tensor([0, 9])}, "cu_seqlens is for sequences packed into one row, and there are 2"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    given = {**dict(zip(NAMES, inputs(9), strict=True)), **changes}
    with pytest.raises(UsageError, match=message):
        chunked(**given)
    if "chunk_size" not in changes:
        with pytest.raises(UsageError, match=message):
            recurrent(**given)


@pytest.mark.parametrize("borders", [[0, 4], [1, 9], [0, 6, 5, 9], [9], [[0, 9]], [0.0, 9.0]])
def test_borders_that_are_none(borders):
    with pytest.raises(
        UsageError, match="cu_seqlens must be whole numbers that rise from 0 to the number of tokens, 9"
    ):
        chunked(*inputs(9, batch=1)[:5], cu_seqlens=torch.tensor(borders))


class Cache:
    def __init__(self, state=None):
        self.states = {3: state}

    def linear_state(self, layer_idx):
        return self.states[layer_idx]

    def set_linear_state(self, layer_idx, state):
        self.states[layer_idx] = state


def layer(dtype=torch.float64, **changes):
    torch.manual_seed(1)
    sizes = {"hidden_size": 12, "num_heads": 2, "head_dim": 4, "layer_idx": 3, "chunk_size": 8}
    return KimiDeltaAttention(**{**sizes, **changes}).to(dtype)


def run(module, x, cache=None, cu_seqlens=None):
    return module(x, SimpleNamespace(cache=cache, cu_seqlens=cu_seqlens))


def hidden(tokens, batch=2, dtype=torch.float64):
    return torch.randn(batch, tokens, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).to(dtype)


def literal(module, x):
    """The formulas of the module's docstring, token by token."""
    p = dict(module.named_parameters())
    heads, width = module.num_heads, module.head_dim
    zero = torch.zeros(heads * width, dtype=x.dtype)
    y = torch.empty_like(x)
    for b in range(len(x)):
        S = torch.zeros(heads, width, width, dtype=x.dtype)
        for t in range(x.shape[1]):
            found = {}
            for name in "qkv":
                seen = [p[f"{name}_proj.weight"] @ x[b, s] if s >= 0 else zero for s in range(t - 3, t + 1)]
                mixed = sum(p[f"{name}_conv1d"][:, i] * seen[i] for i in range(4))
                found[name] = (mixed * mixed.sigmoid()).view(heads, width)
            q, k = (found[n] / (found[n].square().sum(-1, keepdim=True) + 1e-6).sqrt() for n in "qk")
            rate = (p["f_b_proj.weight"] @ p["f_a_proj.weight"] @ x[b, t] + p["dt_bias"]).view(heads, width)
            bound = module.gate_lower_bound
            beta = (p["b_proj.weight"] @ x[b, t]).sigmoid()
            o = torch.empty(heads, width, dtype=x.dtype)
            for h in range(heads):
                A = p["A_log"][h].exp()
                g = -A * F.softplus(rate[h]) if bound is None else bound / (1 + (-A * rate[h]).exp())
                decayed = g.exp()[:, None] * S[h]
                S[h] = decayed + beta[h] * torch.outer(k[h], found["v"][h] - decayed.T @ k[h])
                o[h] = S[h].T @ q[h] / width**0.5
            o = o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt() * p["o_norm.weight"]
            gate = p["g_proj.weight"] if "g_proj.weight" in p else p["g_b_proj.weight"] @ p["g_a_proj.weight"]
            gate = (gate @ x[b, t]).sigmoid()
            y[b, t] = p["o_proj.weight"] @ (o.flatten() * gate)
    return y


K3 = {"gate_lower_bound": -5.0, "full_rank_gate": True}


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, K3, {"gate_lower_bound": -0.5}, {"full_rank_gate": True}])
def test_the_layer_is_its_formula(changes):
    module, x = layer(**changes), hidden(11)
    module.A_log.uniform_(-1, 1)
    module.dt_bias.uniform_(-2, 2)
    module.o_norm.weight.uniform_(0.5, 2)
    torch.testing.assert_close(run(module, x), literal(module, x), rtol=1e-10, atol=1e-10)


def test_gradients_of_a_bounded_decay():
    module = layer(**K3, head_dim=2)
    x = hidden(3, batch=1).requires_grad_()
    torch.autograd.gradcheck(lambda x, *_: run(module, x), (x, module.A_log, module.dt_bias, module.g_proj.weight))


def test_no_decay_is_stronger_than_its_bound():
    module = layer(**K3)
    g = module._log_decay(1e3 * hidden(5))
    assert g.min() >= -5 and g.min() < -4.99 and g.max() <= 0


@torch.no_grad()
@pytest.mark.parametrize("pieces", [[1] * 30, [17, 1, 1, 11], [2, 28], [30]])
def test_decoding_in_pieces_is_one_pass(pieces):
    module, x, cache = layer(), hidden(30), Cache()
    y = torch.cat([run(module, piece, cache) for piece in x.split(pieces, 1)], 1)
    torch.testing.assert_close(y, run(module, x), rtol=1e-10, atol=1e-10)
    assert cache.states[3].conv.shape == (2, 24, 3) and cache.states[3].memory.shape == (2, 2, 4, 4)


@torch.no_grad()
def test_packed_sequences_in_the_layer():
    """Neither convolutions nor states cross a border, in the first pass and in one that goes on."""
    module, x = layer(), hidden(21, batch=1)
    first, second = [9, 1, 3], [1, 5, 2]
    packed, apart = Cache(), [Cache() for _ in first]
    for part, lengths in zip(x.split([13, 8], 1), (first, second), strict=True):
        y = run(module, part, packed, torch.tensor([0, *lengths]).cumsum(0))
        alone = [run(module, piece, c) for piece, c in zip(part.split(lengths, 1), apart, strict=True)]
        torch.testing.assert_close(y, torch.cat(alone, 1), rtol=1e-10, atol=1e-10)
    for ours, theirs in zip(packed.states[3], zip(*(c.states[3] for c in apart), strict=True), strict=True):
        torch.testing.assert_close(ours, torch.cat(theirs), rtol=1e-10, atol=1e-10)


def test_a_convolution_over_one_token():
    module, x, cache = layer(conv_size=1), hidden(6), Cache()
    y = torch.cat([run(module, piece, cache) for piece in x.split([4, 2], 1)], 1)
    torch.testing.assert_close(y, run(module, x), rtol=1e-10, atol=1e-10)


def gradients(function, module, x):
    x = x.clone().requires_grad_()
    y = function(x)
    used = [p for name, p in module.named_parameters() if name != "norm.weight"]
    return y, *torch.autograd.grad((y * torch.linspace(-1, 2, y.numel()).to(y).view_as(y)).sum(), [x, *used])


@pytest.mark.parametrize("changes", [{}, K3])
def test_checkpointing_and_compiling_change_nothing(changes):
    module, x = layer(**changes), hidden(19)
    expected = gradients(lambda x: run(module, x), module, x)
    context = SimpleNamespace(cache=None, cu_seqlens=None)
    compiled = torch.compile(lambda x: module(x, context), fullgraph=True, backend="aot_eager")
    for function in (lambda x: checkpoint(run, module, x, use_reentrant=False), compiled):
        for a, b in zip(gradients(function, module, x), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_in_the_layer(autocast):
    exact, x = layer(), hidden(40)
    module = layer(torch.float32 if autocast else torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        cache = Cache()
        y = run(module, x.bfloat16(), cache)
    truth = run(exact, x)
    assert y.dtype == torch.bfloat16 and cache.states[3].memory.dtype == torch.float32
    assert (y.double() - truth).norm() < 0.03 * truth.norm()


def test_a_bounded_decay_starts_as_flash_linear_attention_has_it():
    """A of 16 would shut the sigmoid."""
    values = dict(layer(**K3).initial_values(lambda role: 0.0, torch.Generator().manual_seed(0), "cpu"))
    assert not values["A_log"].any()
    assert values["dt_bias"].min() > -7 and values["dt_bias"].max() < -2.2


def test_one_gate_matrix_is_split_by_heads():
    assert layer(**K3).split["g_proj.weight"] == 0 and "g_b_proj.weight" not in layer(**K3).split
    plain = {name: p.numel() for name, p in layer().named_parameters()}
    other = {name: p.numel() for name, p in layer(**K3).named_parameters()}
    assert set(plain) - set(other) == {"g_a_proj.weight", "g_b_proj.weight"} and other["g_proj.weight"] == 12 * 8


def test_parameters_and_their_initial_values():
    module = layer(torch.float32, hidden_size=48, num_heads=16, head_dim=8)
    D, H, E = 48, 16, 8
    N = H * E
    matrices = 4 * D * N + 2 * (D * E + E * N) + D * H
    assert sum(p.numel() for p in module.parameters()) == matrices + 3 * N * 4 + N + H + E + D
    draws = [dict(module.initial_values(lambda role: 0.0, torch.Generator().manual_seed(s), "cpu")) for s in (0, 0, 1)]
    assert set(draws[0]) == {"q_conv1d", "k_conv1d", "v_conv1d", "A_log", "dt_bias"}
    for name, value in draws[0].items():
        assert torch.equal(value, draws[1][name]) and not torch.equal(value, draws[2][name])
    step = F.softplus(draws[0]["dt_bias"])
    assert 0.9e-3 < step.min() < 3e-3 and 0.04 < step.max() < 0.11 and 0.005 < step.median() < 0.02
    assert 1 <= draws[0]["A_log"].exp().min() < 5 and 10 < draws[0]["A_log"].exp().max() <= 16
    assert 0.4 < draws[0]["q_conv1d"].abs().max() <= 0.5
    with torch.device("meta"):
        layer(torch.float32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chunk_size": 48}, "chunk_size must be a power of two"),
        ({"head_dim": 0}, "head_dim must be a positive whole number; it is 0"),
        ({"head_dim": 2.5}, "head_dim must be a positive whole number"),
        ({"conv_size": -1}, "conv_size must be a positive whole number"),
    ],
)
def test_layers_that_cannot_be(changes, message):
    with pytest.raises(UsageError, match=message):
        layer(**changes)


@pytest.mark.parametrize(
    ("state", "found"),
    [
        ((torch.zeros(2, 2, 7, 4), torch.zeros(2, 2, 7, 4)), "has a tuple"),
        (KDAState(torch.zeros(2, 24, 3), torch.zeros(2, 2, 5, 4)), r"has \[2, 24, 3\] and \[2, 2, 5, 4\]"),
        (KDAState(torch.zeros(2, 24, 2), torch.zeros(2, 2, 4, 4)), r"has \[2, 24, 2\]"),
        (KDAState(torch.zeros(1, 24, 3), torch.zeros(1, 2, 4, 4)), r"has \[1, 24, 3\]"),
    ],
)
def test_a_state_of_another_layer_is_refused(state, found):
    with pytest.raises(UsageError, match=rf"layer 3 needs a KDAState of \[2, 24, 3\] .* {found}.*; start a new cache"):
        run(layer(), hidden(2), Cache(state))


def test_importing_the_layer_imports_no_kernels():
    code = "import sys, attnres, attnres.model.layers.kda; sys.exit('fla' in sys.modules or 'triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.fixture
def untuned(monkeypatch):
    """Triton's tuned kernels with their first configuration that runs: to compile and time all takes minutes."""
    tuner = pytest.importorskip("triton.runtime.autotuner").Autotuner
    candidates = tuner.prune_configs

    def first_that_runs(self, keywords):
        def seconds(config):
            return self._bench(*self.nargs.values(), config=config, **keywords)[0]  # infinity if it does not run

        return [next(config for config in candidates(self, keywords) if seconds(config) < inf)]

    monkeypatch.setattr(tuner, "prune_configs", first_that_runs)


@needs_gpu
@pytest.mark.skipif(not FLA_INSTALLED, reason="needs the extra fla")
@pytest.mark.parametrize("tokens", [1, 65, 300])
def test_kernels_agree_within_bf16(untuned, tokens):
    arguments = [x.detach().cuda().bfloat16().requires_grad_() for x in inputs(tokens, keys=64, values=64)]
    truth = with_gradients(recurrent, [x.detach().double().requires_grad_() for x in arguments])
    with torch.no_grad():
        decoded = fused(*arguments)
    for form, found in (("decoding", decoded), ("training", with_gradients(fused, arguments))):
        for name, a, b in zip(("o", "final state", *NAMES), found, truth, strict=False):
            assert (a.double() - b).norm() < 0.02 * b.norm(), (form, name)
