"""Decoding gives the greedy tokens of the training path: no cache, gradients on, one pass over everything."""

import pytest
import torch

from attnres.model import Decoder, DecoderConfig, preset
from attnres.model.generate import generate

SHAPE = dict(vocab_size=53, max_position_embeddings=64, initializer_range=0.2, tie_word_embeddings=False)
DENSE = dict(hidden_size=32, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2)
PROMPT = torch.tensor([3, 1, 4, 1, 5, 9, 2])


def trained(config: DecoderConfig, dtype: torch.dtype) -> Decoder:
    model = Decoder(config, seed=1).to(dtype).eval()
    for parameter in model.residual.parameters():
        torch.nn.init.normal_(parameter, 0.3, generator=torch.Generator().manual_seed(1))
    return model


def by_training_path(model: Decoder, count: int) -> list[int]:
    ids = PROMPT
    for _ in range(count):
        logits = model(ids[None])
        assert logits.requires_grad
        ids = torch.cat([ids, logits[0, -1].argmax()[None]])
    return ids[len(PROMPT) :].tolist()


@pytest.mark.parametrize("chunk", [None, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", ["prenorm", "block_attnres", "full_attnres"])
def test_dense(name, dtype, chunk):
    options = {"num_blocks": 3} if name == "block_attnres" else {}
    model = trained(DecoderConfig(**SHAPE, **DENSE, residual=name, residual_options=options), dtype)
    want = by_training_path(model, 12)
    assert list(generate(model, PROMPT, 12, temperature=0, prefill_chunk=chunk)) == want
    assert len(set(want)) > 2


@pytest.mark.parametrize("name", ["block_attnres", "full_attnres"])
def test_hybrid(name):
    """Kimi Delta Attention, latent attention and a mixture of experts, as in the tiny preset."""
    config = DecoderConfig.from_dict({**preset("kimi-linear-tiny").to_dict(), **SHAPE, "residual": name})
    assert set(config.attention_kinds) == {"kda", "mla"} and config.num_experts
    model = trained(config, torch.float64)
    assert list(generate(model, PROMPT, 8, temperature=0)) == by_training_path(model, 8)
