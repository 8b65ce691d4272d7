"""Packed sequences in converted hybrids: no layer sees from one into another, or the packing is refused."""

import pytest
import torch
from transformers import DynamicCache

from attnres import hf
from attnres.errors import UsageError

from . import tiny
from .converted import ALL, build, move_queries, tokens

HYBRIDS = [name for name in ("qwen3_next", "kimi_linear") if name in ALL]
LENGTHS = (4, 5)
POSITIONS = torch.cat([torch.arange(length) for length in LENGTHS])[None]
BORDERS = torch.tensor([0, 4, 9])
BY_BORDERS = {"cu_seq_lens_q": BORDERS, "cu_seq_lens_k": BORDERS, "max_length_q": 5, "max_length_k": 5}


def hybrid(name):
    return move_queries(hf.convert(build(name), num_blocks=2))


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)  # delta rules compute in fp32


@torch.no_grad()
@pytest.mark.parametrize("name", HYBRIDS)
@pytest.mark.parametrize("how", ["positions", "borders", "both", "mask", "hidden states"])
def test_each_sequence_is_as_if_it_were_alone(name, how):
    model, ids = hybrid(name), tokens(1)
    expected = torch.cat([model(part).logits for part in ids.split(LENGTHS, 1)], 1)
    given = {} if how == "borders" else {"position_ids": POSITIONS}
    if how in ("borders", "both"):
        given |= BY_BORDERS
    if how == "mask":
        given["attention_mask"] = torch.ones_like(ids)
    if how == "hidden states":
        given["output_hidden_states"] = True
    close(model(ids, **given).logits, expected)
    assert (model(ids).logits - expected).abs().max() > 0.1


@torch.no_grad()
@pytest.mark.parametrize("name", ["bailing_hybrid", "bamba", "jamba", "lfm2", "olmo_hybrid", "qwen3_5_text"])
def test_recurrences_and_convolutions_end_at_a_border(name):
    if name not in tiny.TYPES:
        pytest.skip("an older transformers")
    model, ids = move_queries(hf.convert(tiny.build(name), num_blocks=2)), tokens(1)
    expected = torch.cat([model(part, use_cache=False).logits for part in ids.split(LENGTHS, 1)], 1)
    close(model(ids, position_ids=POSITIONS, use_cache=False).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("name", HYBRIDS)
def test_rows_are_packed_each_in_its_own_way(name):
    model, ids = hybrid(name), tokens(2)
    positions = torch.cat([POSITIONS, torch.cat([torch.arange(7), torch.arange(2)])[None]])
    rows = zip(ids.split(1), (LENGTHS, (7, 2)), strict=True)
    expected = [torch.cat([model(part).logits for part in row.split(lengths, 1)], 1) for row, lengths in rows]
    close(model(ids, position_ids=positions).logits, torch.cat(expected))


@pytest.mark.parametrize("name", HYBRIDS)
def test_gradients_stay_in_their_sequence(name):
    model, ids = hybrid(name).train(), tokens(1)
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
    model(inputs_embeds=embeddings, position_ids=POSITIONS).logits[:, 4:].square().sum().backward()
    assert not embeddings.grad[:, :4].any() and embeddings.grad[:, 4:].any()


@torch.no_grad()
def test_a_cache_has_one_sequence_a_row():
    model, ids = hybrid(HYBRIDS[0]), tokens(1)
    for given in ({"use_cache": True}, {"past_key_values": DynamicCache(config=model.config)}):
        with pytest.raises(UsageError, match="a cache has one sequence a row"):
            model(ids, position_ids=POSITIONS, **given)
    mask = torch.ones_like(ids)
    mask[:, :2] = 0
    with pytest.raises(UsageError, match="attention_mask must be left out"):
        model(ids, position_ids=POSITIONS, attention_mask=mask)
