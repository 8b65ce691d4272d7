"""The decoder over every residual connection: what is equal, what compiles, what is counted."""

import pytest
import torch
from torch.nn import functional as F

from attnres.errors import UsageError
from attnres.model import Decoder, DecoderConfig, preset, presets
from attnres.parallel.weights import initial_values

SHAPE = dict(vocab_size=61, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2)
IDS = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(0))
VARIANTS = [
    ("prenorm", {}),
    ("full_attnres", {}),
    ("full_attnres", {"schedule": "two_phase"}),
    ("block_attnres", {"num_blocks": 2}),
    ("block_attnres", {"block_size": 4}),
    ("block_attnres", {"num_blocks": 2, "schedule": "two_phase"}),
    ("block_attnres", {"num_blocks": 6}),
    ("block_attnres", {"num_blocks": 1, "stream_scale": False}),
]


def decoder(name="block_attnres", options=None, **changes):
    return Decoder(DecoderConfig(**{**SHAPE, **changes}, residual=name, residual_options=options or {}))


def trained_like(model):
    generator = torch.Generator().manual_seed(3)
    for p in model.residual.parameters():
        torch.nn.init.normal_(p, generator=generator)
    return model


def gradients(model):
    loss = F.cross_entropy(model(IDS).flatten(0, 1), IDS.flatten())
    return torch.autograd.grad(loss, list(model.parameters()))


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_zero_queries_give_the_prenorm_model(name, options):
    """Catches an embedding counted twice, a source left out, a wrong block border (paper section 13 of our notes)."""
    plain, model = decoder("prenorm", rms_norm_eps=0.0).double(), decoder(name, options, rms_norm_eps=0.0).double()
    shared = dict(model.named_parameters())
    assert all(torch.equal(p, shared[n]) for n, p in plain.named_parameters()), "shared weights start equal"
    torch.testing.assert_close(model(IDS), plain(IDS), rtol=1e-10, atol=1e-10)


def test_stream_scale_keeps_eps_from_biting():
    plain = decoder("prenorm", rms_norm_eps=1e-5).double()
    scaled = decoder("full_attnres", {}, rms_norm_eps=1e-5).double()
    mean = decoder("full_attnres", {"stream_scale": False}, rms_norm_eps=1e-5).double()
    assert (scaled(IDS) - plain(IDS)).abs().max() < 1e-12
    assert (mean(IDS) - plain(IDS)).abs().max() > 1e-4


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_checkpointing_gives_identical_gradients(name, options):
    model = trained_like(decoder(name, options).double())
    plain = gradients(model)
    model.enable_checkpointing()
    for kept, want in zip(gradients(model), plain, strict=True):
        torch.testing.assert_close(kept, want, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["full_attnres", "block_attnres"])
@pytest.mark.parametrize("schedule", ["layerwise", "two_phase"])
def test_compiles_in_one_graph(name, schedule):
    options = {"schedule": schedule}
    model = trained_like(decoder(name, options, num_hidden_layers=2))
    want, want_gradients = model(IDS), gradients(model)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(IDS), want)
    with torch.no_grad():
        torch.testing.assert_close(compiled(IDS), want.detach())
    loss = F.cross_entropy(compiled(IDS).flatten(0, 1), IDS.flatten())
    for got, expected in zip(torch.autograd.grad(loss, list(model.parameters())), want_gradients, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("name", ["full_attnres", "block_attnres"])
def test_layers_compile_once_a_kind(name):
    """Whatever number of sources is read in front of them."""
    model = trained_like(decoder(name, num_hidden_layers=6))
    want, want_gradients = model(IDS), gradients(model)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    for layer in model.layers:
        layer.compile(backend=backend, fullgraph=True)
    torch.testing.assert_close(model(IDS), want)
    torch.testing.assert_close(gradients(model), want_gradients)
    assert len(graphs) == 2, "one attention and one MLP"


def test_compiles_with_inductor_too():
    torch.compiler.reset()
    model = trained_like(decoder(num_hidden_layers=1))
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(IDS), model(IDS))


class Cache:
    """Keys and values in plain lists, with the interface of Hugging Face's caches."""

    def __init__(self):
        self.entries = {}

    def update(self, key_states, value_states, layer_idx):
        if layer_idx in self.entries:
            keys, values = self.entries[layer_idx]
            key_states, value_states = torch.cat([keys, key_states], 2), torch.cat([values, value_states], 2)
        self.entries[layer_idx] = key_states, value_states
        return key_states, value_states

    def get_seq_length(self):
        return self.entries[0][0].shape[2] if self.entries else 0


@pytest.mark.parametrize("pieces", [[9], [4, 5], [1] * 9, [3, 1, 5]])
def test_cached_pieces_equal_one_pass(pieces):
    model, cache = trained_like(decoder().double()), Cache()
    parts = [model(piece, cache) for piece in IDS.split(pieces, 1)]
    torch.testing.assert_close(torch.cat(parts, 1), model(IDS), rtol=1e-12, atol=1e-12)


def test_the_future_is_not_seen():
    model, changed = trained_like(decoder().double()), IDS.clone()
    changed[:, 5:] = 0
    torch.testing.assert_close(model(changed)[:, :5], model(IDS)[:, :5], rtol=0, atol=1e-14)


def test_autocast_trains_every_parameter():
    model = trained_like(decoder())
    with torch.autocast("cpu", torch.bfloat16):
        grads = gradients(model)
    assert all(g.isfinite().all() and g.any() for g in grads)
    assert all(g.dtype == torch.float32 for g in grads)


def test_parameter_counts_are_exact():
    config = DecoderConfig(**SHAPE, intermediate_size=48, residual="full_attnres")
    attention, mlp = 32 * 32 * 2 + 32 * 16 * 2 + 32, 3 * 32 * 48 + 32
    body = 3 * (attention + mlp) + 32 + 2 * 7 * 32
    assert config.parameter_counts() == {"total": body + 61 * 32, "activated": body, "embedding": 61 * 32}
    untied = DecoderConfig(**SHAPE, intermediate_size=48, residual="full_attnres", tie_word_embeddings=False)
    assert untied.parameter_counts() == {"total": body + 2 * 61 * 32, "activated": body, "embedding": 2 * 61 * 32}


def test_flops_count_matrices_attention_and_reads():
    shape = {**SHAPE, "num_key_value_heads": 4, "intermediate_size": 48}
    matrices = 2 * (3 * (4 * 32 * 32 + 3 * 32 * 48) + 61 * 32)
    attention = 4 * 32 * 3 * (10 + 1) / 2
    assert DecoderConfig(**shape, residual="prenorm").flops_per_token(10) == 3 * (matrices + attention)
    sources = [2, 3, 4, 5, 6, 7]  # layer 0 has one source and reads for nothing
    reads = 6 * 32 * sum(sources)
    assert DecoderConfig(**shape, residual="full_attnres").flops_per_token(10) == 3 * (matrices + attention + reads)


def test_config_round_trips_and_presets_build():
    for name in presets():
        config = preset(name)
        assert DecoderConfig.from_dict(config.to_dict()) == config
        assert config.parameter_counts()["total"] > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 0}, "hidden_size must be a positive"),
        ({"num_attention_heads": 5, "num_key_value_heads": 5}, "must divide hidden_size"),
        ({"num_key_value_heads": 3}, "num_key_value_heads must divide"),
        ({"head_dim": 7}, "head_dim must be even"),
        ({"residual": "prenrm"}, "did you mean 'prenorm'"),
    ],
)
def test_bad_shapes_are_named(change, message):
    with pytest.raises(UsageError, match=message):
        DecoderConfig(**{**SHAPE, **change})


def test_unknown_names_are_refused():
    with pytest.raises(UsageError, match="preset 'huge' is unknown"):
        preset("huge")
    with pytest.raises(UsageError, match="no field 'layers'"):
        DecoderConfig.from_dict({"layers": 3})
    with pytest.raises(UsageError, match="input_ids"):
        decoder()(IDS[:, :0])


@pytest.mark.parametrize(
    "build", [lambda config: Decoder(config, seed=3), lambda config: dict(initial_values(config, 3))]
)
def test_initial_values_reseed_no_generator(monkeypatch, build):
    """torch.manual_seed seeds the GPUs as well, whose state nobody puts back."""
    monkeypatch.setattr(torch, "manual_seed", lambda seed: pytest.fail("every device is seeded"))
    torch.default_generator.manual_seed(11)
    config = DecoderConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, residual="mhc")
    first = build(config)
    assert torch.initial_seed() == 11
    torch.default_generator.manual_seed(12)
    again = build(config)
    values = [dict(m.named_parameters()) if isinstance(m, Decoder) else m for m in (first, again)]
    assert all(torch.equal(value, values[1][name]) for name, value in values[0].items())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_nor_those_of_a_gpu():
    config = DecoderConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, residual="mhc")
    torch.cuda.manual_seed(11)
    Decoder(config, seed=3)
    with torch.device("cuda"):
        first, again = Decoder(config, seed=3), Decoder(config, seed=3)
    assert torch.cuda.initial_seed() == 11
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), again.parameters(), strict=True))
