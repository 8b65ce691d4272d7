"""Labels for texts and tokens: heads over native and converted models, from the folder of a language model."""

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("transformers")
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

import attnres.hf
from attnres.hf import AttnResConfig, AttnResForCausalLM

from .converted import COMMON, VOCAB, build, move_queries

PAD = 0
NAMES = ["full_attnres", "block_attnres", "llama", "qwen3"]
CLASS = {"full_attnres": "AttnRes", "block_attnres": "AttnRes", "llama": "AttnResLlama", "qwen3": "AttnResQwen3"}


@pytest.fixture(scope="module", params=NAMES)
def folder(request, tmp_path_factory):
    """A language model with queries that have moved, on disk."""
    torch.manual_seed(0)
    if request.param in ("llama", "qwen3"):
        model = attnres.hf.convert(build(request.param, torch.float32), num_blocks=2)
    else:
        model = AttnResForCausalLM(AttnResConfig(**COMMON, initializer_range=0.3, residual=request.param))
    move_queries(model)
    model.config.pad_token_id = PAD
    place = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(place)
    return place, CLASS[request.param]


def texts():
    """Two texts of unequal length: ids padded on the right, on the left, and the texts alone."""
    long = torch.randint(1, VOCAB, (9,), generator=torch.Generator().manual_seed(1))
    short = long[:4].flip(0)
    right = torch.stack([long, F.pad(short, (0, 5), value=PAD)])
    left = torch.stack([long, F.pad(short, (5, 0), value=PAD)])
    return right, left, [long[None], short[None]]


def test_a_label_for_a_text(folder, tmp_path):
    place, name = folder
    model = AutoModelForSequenceClassification.from_pretrained(place, num_labels=3).eval()
    assert type(model).__name__ == f"{name}ForSequenceClassification"
    right, left, alone = texts()
    body = AutoModel.from_pretrained(place).eval()
    with torch.no_grad():
        expected = torch.cat([model.score(body(ids).last_hidden_state[:, -1]) for ids in alone])
        for ids in (right, left):
            found = model(ids, attention_mask=(ids != PAD).long()).logits
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (expected[0] - expected[1]).abs().max() > 1e-3
    trained_and_reloaded(
        model, {"input_ids": right, "attention_mask": (right != PAD).long()}, torch.tensor([2, 0]), tmp_path
    )


def test_a_label_for_each_token(folder, tmp_path):
    place, name = folder
    model = AutoModelForTokenClassification.from_pretrained(place, num_labels=4).eval()
    assert type(model).__name__ == f"{name}ForTokenClassification"
    right, _, alone = texts()
    labels = torch.where(right == PAD, -100, right % 4)
    body = AutoModel.from_pretrained(place).eval()
    with torch.no_grad():
        found = model(right, attention_mask=(right != PAD).long(), labels=labels)
        expected = [model.score(body(ids).last_hidden_state)[0] for ids in alone]
    for row, scores in zip(found.logits, expected, strict=True):
        torch.testing.assert_close(row[: len(scores)], scores, rtol=1e-4, atol=1e-5)
    loss = F.cross_entropy(torch.cat(expected), labels[labels != -100])
    torch.testing.assert_close(found.loss, loss, rtol=1e-4, atol=1e-5)
    trained_and_reloaded(model, {"input_ids": right, "attention_mask": (right != PAD).long()}, labels, tmp_path)


def test_a_language_model_is_what_it_was(folder):
    place, name = folder
    assert type(AutoModelForCausalLM.from_pretrained(place)).__name__ == f"{name}ForCausalLM"


def trained_and_reloaded(model, inputs, labels, place):
    """A few steps lower the loss and move the queries, and what is saved is what is loaded."""
    model.eval()  # heads drop some of their input in training
    query = model.base_model.residual.pseudo_query
    before, at_first = model(**inputs, labels=labels).loss.item(), query.detach().clone()
    optimizer = torch.optim.AdamW(attnres.hf.parameter_groups(model, lr=1e-3, weight_decay=0.0))
    for _ in range(5):
        optimizer.zero_grad()
        model(**inputs, labels=labels).loss.backward()
        optimizer.step()
    assert model(**inputs, labels=labels).loss < before
    assert (query != at_first).any(1)[1:].all()  # a query of the embedding alone has nothing to choose
    model.save_pretrained(place)
    loaded = type(model).from_pretrained(place).eval()
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
