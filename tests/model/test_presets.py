"""The named shapes: what they count, and what the smallest hybrid does."""

import pytest
import torch

from attnres.commands.flags import shape_of
from attnres.errors import UsageError
from attnres.model import Decoder, DecoderConfig, preset, presets

SCALING = {"attnres-194m": 194, "attnres-241m": 241, "attnres-296m": 296, "attnres-436m": 436, "attnres-528m": 528}


@pytest.mark.parametrize("name", SCALING)
def test_the_scaling_table_is_met_within_three_percent(name):
    """Paper section 7: activated parameters without embeddings."""
    assert preset(name).parameter_counts()["activated"] == pytest.approx(SCALING[name] * 1e6, rel=0.03)


def test_the_48b_model_is_the_published_one():
    config = preset("kimi-linear-48b-a3b")
    counts = config.parameter_counts()
    assert counts["total"] == pytest.approx(49.1e9, rel=0.001)
    assert counts["activated"] == pytest.approx(2.73e9, rel=0.001)
    assert counts["embedding"] == 2 * 163840 * 2304
    full = [block + 1 for block, kind in enumerate(config.attention_kinds) if kind == "mla"]
    assert full == [4, 8, 12, 16, 20, 24, 27] and set(config.attention_kinds) == {"kda", "mla"}
    residual = config.build_residual()
    assert (residual.num_blocks, len(residual.block_starts)) == (9, 9) and config.num_layers == 54


def test_the_tiny_kimi_k3_counts_as_published_and_matrix_by_matrix():
    config = preset("kimi-k3-tiny")
    counts = config.parameter_counts()
    assert counts["total"] == pytest.approx(0.40e9, rel=0.005)
    full = [block + 1 for block, kind in enumerate(config.attention_kinds) if kind == "mla"]
    assert full == [4, 8] and config.build_residual().block_starts == (0, 8)
    D, N = 1024, 8 * 32
    delta = 5 * D * N + 32 * (D + N) + 8 * D + 3 * 4 * N + N + 8 + 32
    latent = 256 * (D + 8 * 96) + 256 + D * (128 + 32) + 128 + 128 * 8 * 128 + 2 * D * 8 * 64
    expert, shared = 3 * 512 * 256, 3 * D * 2 * 256
    experts = 8 * D + 8 * expert + 2 * D * 512 + 512 + shared
    layers = 6 * delta + 2 * latent + 7 * experts + 3 * D * 4096 + 16 * D
    depth = 17 * 2 * D
    assert counts["embedding"] == 2 * 163840 * D
    assert counts["total"] == counts["embedding"] + layers + D + depth
    assert counts["activated"] == layers + D + depth - 7 * 6 * expert


def test_activated_leaves_out_the_experts_that_a_token_does_not_meet():
    shape = dict(vocab_size=11, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, residual="prenorm")
    few = DecoderConfig(**shape, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=5).parameter_counts()
    many = DecoderConfig(**shape, num_experts=9, num_experts_per_tok=2, moe_intermediate_size=5).parameter_counts()
    assert many["total"] - few["total"] == 2 * 5 * (3 * 8 * 5 + 8)
    assert many["activated"] - few["activated"] == 2 * 5 * 8  # rows of the router


def test_operations_of_every_kind_by_hand():
    shape = dict(vocab_size=11, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, residual="prenorm")
    sizes = dict(kv_lora_rank=6, qk_nope_head_dim=4, qk_rope_head_dim=2, v_head_dim=3, linear_head_dim=4)
    experts = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=5)
    common = 2 * (3 * 3 * 8 * 5 + 4 * 8) + 2 * 11 * 8  # three of five experts' MLPs, the router, the head

    def forward(kind, context):
        return DecoderConfig(**shape, **sizes, **experts, attention_pattern=(kind,)).flops_per_token(context) / 3

    latent = 2 * (8 * 12 + 8 * 8 + 6 * 14 + 6 * 8)
    assert forward("mla", 9) == common + latent + 2 * 5 * 2 * (6 + 3)
    width = 2 * 4
    delta = 2 * (4 * 8 * width + 2 * (8 * 4 + 4 * width) + 8 * 2 + 3 * 4 * width)
    assert forward("kda", 9) == forward("kda", 999) == common + delta + width * (6 * 4 + 5 * 65)


def test_operations_of_kimi_k3s_layers_by_hand():
    shape = dict(vocab_size=11, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, residual="prenorm")
    sizes = dict(kv_lora_rank=6, qk_nope_head_dim=4, qk_rope_head_dim=2, v_head_dim=3, linear_head_dim=4)
    experts = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=5, routed_expert_hidden_size=7)
    more = dict(q_lora_rank=9, mla_use_output_gate=True, linear_full_rank_gate=True, latent_moe_use_norm=True)
    common = 2 * (2 * 3 * 7 * 5 + 2 * 8 * 7 + 3 * 8 * 5 + 4 * 8) + 2 * 11 * 8

    def forward(kind, context):
        config = DecoderConfig(**shape, **sizes, **experts, **more, attention_pattern=(kind,), hidden_act="situ")
        return config.flops_per_token(context) / 3

    latent = 2 * (8 * 9 + 9 * 12 + 8 * 8 + 6 * 14 + 2 * 6 * 8)
    assert forward("mla", 9) == common + latent + 2 * 5 * 2 * (6 + 3)
    width = 2 * 4
    delta = 2 * (5 * 8 * width + 8 * 4 + 4 * width + 8 * 2 + 3 * 4 * width)
    assert forward("kda", 9) == common + delta + width * (6 * 4 + 5 * 65)


@pytest.mark.parametrize("name", presets())
def test_presets_reopen_as_flags_show_them(name):
    config = preset(name)
    sizes = {name.removeprefix("model."): value for name, value in shape_of(config).items()}
    shape = DecoderConfig(**sizes)
    assert all(getattr(config, name) == getattr(shape, name) for name in sizes)


def test_open_sizes_follow_others():
    shape = shape_of(preset("kimi-linear-48b-a3b"))
    assert shape["model.linear_num_heads"] is None
    assert (shape["model.head_dim"], shape["model.intermediate_size"]) == (128, 9216)
    assert shape_of(preset("tiny"))["model.kv_lora_rank"] is None


def test_the_tiny_hybrid_learns():
    model = Decoder(preset("kimi-linear-tiny"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    tokens = torch.randint(0, 257, (2, 25), generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(8):
        loss = torch.nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1


def test_an_unknown_preset_is_refused():
    with pytest.raises(UsageError, match=r"preset 'huge' is unknown; known: tiny, .*kimi-linear-48b-a3b"):
        preset("huge")
