"""Prompts in chunks by transformers' own setting: the same logits, and memory that grows with the chunk."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
import attnres.hf
from attnres.errors import UsageError
from attnres.hf import AttnResConfig, AttnResForCausalLM

from .converted import COMMON, PAD, build, move_queries, padded

LENGTH = 9
HYBRID = {"attention_pattern": ("kda", "mla", "gqa"), "num_experts": 4, "num_experts_per_tok": 2}


def native(residual, **changes):
    torch.manual_seed(0)
    model = AttnResForCausalLM(AttnResConfig(**{**COMMON, **changes}, initializer_range=0.3, residual=residual))
    for parameter in model.model.residual.parameters():
        torch.nn.init.normal_(parameter)
    return model.double().eval()


MODELS = {
    "block": lambda: native("block_attnres"),
    "full": lambda: native("full_attnres"),
    "hybrid": lambda: native("block_attnres", **HYBRID),
    "llama": lambda: move_queries(attnres.hf.convert(build("llama"), num_blocks=3)),
    "gpt2": lambda: move_queries(attnres.hf.convert(build("gpt2"), "full_attnres")),
}


def logits(model, chunk, **options):
    """Of three tokens after a prompt of two rows, the second of them padded in front."""
    ids, mask = padded("left", LENGTH)
    found = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=3,
        do_sample=False,
        pad_token_id=PAD,
        prefill_chunk_size=chunk,
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )
    return torch.stack(found.logits)


@pytest.mark.parametrize("name", MODELS)
def test_logits_do_not_depend_on_the_chunk(name):
    model = MODELS[name]()
    whole, lengths = logits(model, None), []
    base = model.base_model
    read = base.residual.read

    def watched(state, layer, norm=None):
        lengths.extend(source.shape[1] for source in base.residual.sources(state, layer))
        return read(state, layer, norm)

    base.residual.read = watched
    for chunk in (1, 4, LENGTH, 50):
        lengths.clear()
        torch.testing.assert_close(logits(model, chunk), whole, rtol=1e-8, atol=1e-8)
        assert max(lengths) == min(chunk, LENGTH)


def test_a_static_cache_takes_chunks_too():
    model = native("block_attnres")
    found = logits(model, 4, cache_implementation="static", disable_compile=True)
    torch.testing.assert_close(found, logits(model, None), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", ["block", "llama"])
def test_memory_grows_with_the_chunk_and_not_with_the_prompt(name, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import memory

    sizes = {"hidden_size": 128, "num_key_value_heads": 1, "max_position_embeddings": 1024}
    model = native("block_attnres", **sizes) if name == "block" else attnres.hf.convert(build("llama", **sizes))

    def peak(length, chunk):
        ids = torch.ones(1, length, dtype=torch.int64)
        call = dict(max_new_tokens=1, do_sample=False, pad_token_id=PAD, prefill_chunk_size=chunk)
        return memory.allocated(lambda: model.generate(ids, **call), torch.device("cpu"))[0]

    token = 8 * 128  # bytes of a token of the stream; its keys and values in three layers are 1.5 of them
    few, many = peak(256, 32), peak(512, 32)
    cached, masks = 1.5 * token * 256, 2 * 9 * 32 * 256  # transformers' mask over all keys, boolean and as numbers
    assert many - few < 1.2 * (cached * 4 / 3 + masks)  # a layer's keys are there twice when they grow
    sources = 7  # six blocks of a layer each and the embedding
    assert peak(512, 512) - many > sources * token * (512 - 32)


def test_an_empty_prompt_is_refused():
    with pytest.raises(UsageError, match="the prompt is empty; give at least one token"):
        native("block_attnres").generate(torch.empty(1, 0, dtype=torch.int64), max_new_tokens=1)
