"""Decoders of several kinds of attention with experts: cache, checkpointing, initial weights, and what is refused."""

import pytest
import torch
from torch.nn import functional as F

from attnres import residual
from attnres.analysis.measure.mixing import mixing_matrix
from attnres.analysis.measure.probe import probe
from attnres.errors import UsageError
from attnres.model import Decoder, DecoderConfig
from attnres.model.cache import KeyValueCache
from attnres.model.generate import generate

SHAPE = dict(
    vocab_size=41,
    hidden_size=32,
    num_hidden_layers=5,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=24,
    attention_pattern=("kda", "mla", "gqa"),
    linear_chunk_size=4,
    num_experts=6,
    num_experts_per_tok=2,
    first_k_dense_replace=1,
    routed_scaling_factor=2.4,
    max_position_embeddings=64,
    initializer_range=0.2,
    tie_word_embeddings=False,
)
IDS = torch.randint(0, 41, (2, 11), generator=torch.Generator().manual_seed(0))


def decoder(name="block_attnres", seed=3, **changes):
    model = Decoder(DecoderConfig(**{**SHAPE, **changes}, residual=name), seed=seed).double()
    for parameter in model.residual.parameters():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    return model


def test_the_pattern_repeats_and_the_first_blocks_stay_dense():
    model = decoder()
    kinds = [type(layer).__name__ for layer in model.layers]
    attention = ["KimiDeltaAttention", "MultiHeadLatentAttention", "Attention", "KimiDeltaAttention"]
    assert kinds[::2] == [*attention, "MultiHeadLatentAttention"]
    assert kinds[1::2] == ["FeedForward"] + 4 * ["MixtureOfExperts"]


K3 = dict(
    hidden_act="situ",
    activation_situ_beta=1.5,
    linear_gate_lower_bound=-5.0,
    linear_full_rank_gate=True,
    q_lora_rank=12,
    mla_use_output_gate=True,
    routed_expert_hidden_size=20,
    latent_moe_use_norm=True,
)


@torch.no_grad()
@pytest.mark.parametrize("parts", [[1] * 11, [4, 1, 1, 5]])
def test_cached_decoding_with_kimi_k3s_layers(parts):
    model, cache = decoder(**K3).eval(), KeyValueCache()
    logits = torch.cat([model(part, cache) for part in IDS.split(parts, 1)], 1)
    torch.testing.assert_close(logits, model(IDS), rtol=1e-10, atol=1e-10)


def test_initial_sizes_of_kimi_k3s_layers_follow_their_roles():
    """What adds to the stream starts smaller, what leads to a latent does not."""
    model = Decoder(DecoderConfig(**{**SHAPE, **K3, "hidden_size": 256}, residual="block_attnres"))
    small = 0.2 * 10**-0.5
    moe, mla = model.layers[3], model.layers[2]
    for tensor, std in (
        (moe.routed_expert_up_proj.weight, small),
        (moe.routed_expert_down_proj.weight, 0.2),
        (moe.down_proj, 0.2),
        (mla.g_proj.weight, 0.2),
        (mla.q_b_proj.weight, 0.2),
        (mla.o_proj.weight, small),
    ):
        assert tensor.std().item() == pytest.approx(std, rel=0.05)
    assert model(IDS).isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("pattern", [("kda", "mla", "gqa"), ("kda",), ("mla", "kda")])
@pytest.mark.parametrize("parts", [[1] * 11, [4, 1, 1, 5], [2, 9]])
def test_cached_decoding_equals_full_recomputation(pattern, parts):
    model, cache = decoder(attention_pattern=pattern).eval(), KeyValueCache()
    logits = torch.cat([model(part, cache) for part in IDS.split(parts, 1)], 1)
    torch.testing.assert_close(logits, model(IDS), rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_greedy_generation_is_that_without_a_cache():
    model, ids = decoder().eval(), IDS[0, :5]
    found = list(generate(model, ids, 20, temperature=0))
    for _ in range(20):
        ids = torch.cat([ids, model(ids[None])[0, -1].argmax()[None]])
    assert found == ids[5:].tolist() and len(set(found)) > 3


@pytest.mark.parametrize("name", ["prenorm", "block_attnres"])
def test_checkpointing_gives_identical_gradients_and_counts_tokens_once(name):
    found, loads = [], []
    for enabled in (False, True):
        model = decoder(name)
        model.residual.schedule = "layerwise"  # as a lean state is read
        model.enable_checkpointing(enabled)
        F.cross_entropy(model(IDS).flatten(0, 1), IDS.flatten()).backward()
        found.append([parameter.grad for parameter in model.parameters()])
        loads.append([layer.load.sum().item() for layer in model.layers if hasattr(layer, "load")])
    assert all(gradient is not None for gradient in found[0])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert loads[0] == loads[1] == [2 * IDS.numel()] * 4


@pytest.mark.parametrize("name", sorted(residual.names()))
def test_equal_seeds_give_equal_weights_whatever_the_residual(name):
    plain, model = Decoder(DecoderConfig(**SHAPE, residual="prenorm")), Decoder(DecoderConfig(**SHAPE, residual=name))
    shared = dict(model.named_parameters())
    scaled = model.residual.xavier_init or any(model.residual.init_scale(r) != 1 for r in ("value", "output"))
    for own, parameter in plain.named_parameters():
        if own in shared and not (own.startswith("layers.") and scaled):
            assert torch.equal(parameter, shared[own]), own
    assert model(IDS).isfinite().all()


def test_zero_queries_give_the_prenorm_model():
    plain, model = (
        Decoder(DecoderConfig(**SHAPE, rms_norm_eps=0.0, residual=n)).double().eval()
        for n in ("prenorm", "full_attnres")
    )
    torch.testing.assert_close(model(IDS), plain(IDS), rtol=1e-8, atol=1e-8)


def test_analysis_reads_hybrids():
    model = decoder()
    found = probe(model, [(IDS[:, :-1], IDS[:, 1:])])
    assert len(found["output_magnitude"]) == 5 and len(found["depth_weights"]) == 11
    assert mixing_matrix(model, IDS).isfinite().all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_pattern": ("kda", "lstm")}, "unknown kind 'lstm'; known: gqa, mla, kda"),
        ({"attention_pattern": ()}, "attention_pattern is empty"),
        ({"linear_chunk_size": 48}, "linear_chunk_size must be a power of two, such as 64; it is 48"),
        ({"num_experts_per_tok": 7}, "num_experts_per_tok must be at most num_experts; it is 7, and there are 6"),
        ({"num_experts": -1}, "num_experts must be a non-negative whole number"),
        ({"kv_lora_rank": 0}, "kv_lora_rank must be a positive whole number"),
        ({"routed_scaling_factor": 0.0}, "routed_scaling_factor must be positive"),
        ({"hidden_act": "gelu"}, "hidden_act must be silu or situ; it is 'gelu'"),
        ({"activation_situ_beta": 0.0}, "activation_situ_beta must be positive; it is 0.0"),
        (
            {"activation_situ_linear_beta": -1.0},
            "activation_situ_linear_beta must be positive, or 0 for none; it is",
        ),
        ({"linear_gate_lower_bound": 5.0}, "linear_gate_lower_bound must be negative, such as -5, or None; it is 5.0"),
        ({"q_lora_rank": 0}, "q_lora_rank must be a positive whole number; it is 0"),
        ({"routed_expert_hidden_size": 0}, "routed_expert_hidden_size must be a positive whole number; it is 0"),
        ({"latent_moe_use_norm": True}, "latent_moe_use_norm is for experts of another width; give routed_expert_hid"),
    ],
)
def test_shapes_that_cannot_be(changes, message):
    with pytest.raises(UsageError, match=message):
        DecoderConfig(**{**SHAPE, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_pattern": ("gqa",)}, "holds 4 linear attention states of 8 x 8 .* needs 2 keys and values"),
        ({"linear_num_heads": 2}, "needs 2 linear attention states"),
        ({"kv_lora_rank": 9}, "in attention layer 1, .* a latent of 9"),
        ({"num_hidden_layers": 4}, "holds 5 attention layers, and this model needs 4"),
    ],
)
def test_a_cache_of_another_architecture_is_refused(changes, message):
    cache = KeyValueCache()
    decoder()(IDS, cache)
    with pytest.raises(UsageError, match=message):
        decoder(**changes)(IDS, cache)


def test_a_saved_config_without_the_new_fields_loads_as_before():
    saved = {
        "vocab_size": 41,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "residual": "prenorm",
    }
    model = Decoder(DecoderConfig.from_dict(saved))
    assert [type(layer).__name__ for layer in model.layers] == 2 * ["Attention", "FeedForward"]
    config = DecoderConfig(**SHAPE)
    assert DecoderConfig.from_dict({**config.to_dict(), "attention_pattern": ["kda", "mla", "gqa"]}) == config
