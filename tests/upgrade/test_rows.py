"""Sequences in rows: nothing lost, nothing seen from one into another, one order for all arms."""

import itertools
import types

import numpy as np
import pytest
import torch

from attnres import hf
from attnres.errors import Failure
from attnres.upgrade.documents import cut, documents
from attnres.upgrade.held_out import losses
from attnres.upgrade.proof import LENGTH, keeps_apart
from attnres.upgrade.rows import IGNORED, Tokens, opened, order, pack, save

from ..hf.converted import move_queries
from .tiny import WORDS, byte_tokenizer, tiny_model


def sequences(*lengths):
    starts = np.cumsum([0, *lengths])
    return [Tokens(np.arange(a, b), np.arange(a, b) > a) for a, b in itertools.pairwise(starts)]


def pieces(rows):
    """The sequences in rows, by their positions; without those of padding, and with what is scored of them."""
    for ids, positions, scored in zip(rows.ids, rows.positions, rows.scored, strict=True):
        borders = [*np.flatnonzero(positions == 0), len(ids)]
        for begin, end in itertools.pairwise(borders):
            assert positions[begin:end].tolist() == list(range(end - begin))
            if scored[begin:end].any():
                yield ids[begin:end].tolist(), scored[begin:end].tolist()


@pytest.mark.parametrize("packed", [True, False])
def test_every_sequence_is_whole_in_one_row(packed):
    given = sequences(5, 8, 3, 4, 2, 8, 7, 1)
    rows = pack(given, 8, 99, packed)
    # 8, 8, 7, 5 + 3, 4 + 2: the single token fills up a row; or a row each
    assert rows.ids.shape == ((5, 8) if packed else (8, 8))
    found = {tuple(ids[: len(scored)]): scored for ids, scored in pieces(rows)}
    for sequence in given[:-1]:
        ids = tuple(sequence.ids)
        match = next(row for row in found if row[: len(ids)] == ids)
        assert set(match[len(ids) :]) <= {99} and found[match][: len(ids)] == [False, *[True] * (len(ids) - 1)]
        assert not any(found[match][len(ids) :])
    assert rows.targets == sum(len(s.ids) - 1 for s in given)


def test_a_first_token_is_never_predicted_from_the_sequence_before():
    row = pack([Tokens(np.arange(4), np.ones(4, bool)), Tokens(np.arange(10, 14), np.ones(4, bool))], 8, 0, True)[0]
    assert row["labels"].tolist() == [IGNORED, 1, 2, 3, IGNORED, 11, 12, 13]
    assert row["position_ids"].tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    assert "position_ids" not in pack(sequences(3), 8, 0, False)[0]


def test_a_long_document_is_cut_so_that_each_token_is_predicted_once():
    document = np.arange(23)
    found = list(cut(document, 8))
    assert [len(piece.ids) for piece in found] == [8, 8, 8, 2]
    assert np.concatenate([piece.ids[piece.scored] for piece in found]).tolist() == list(range(1, 23))


def test_the_order_is_of_the_seed_and_takes_every_row_once_before_any_twice():
    first = order(7, 18, 3)
    assert sorted(first[:7]) == sorted(first[7:14]) == list(range(7)) and first[:7].tolist() != first[7:14].tolist()
    assert order(7, 18, 3).tolist() == first.tolist() != order(7, 18, 4).tolist()


def test_rows_are_read_as_they_were_written(tmp_path):
    rows = pack(sequences(5, 8, 3), 8, 0, True)
    save(rows, tmp_path / "rows")
    again = opened(tmp_path / "rows", True)
    assert all(torch.equal(rows[i][name], again[i][name]) for i in range(2) for name in rows[i])
    assert again.spread(1).ids.tolist() == rows.ids[:1].tolist() and len(again.spread(9)) == 2
    assert pack(sequences(8, 8, 8, 8, 8), 8, 0, True).spread(2).ids[:, 0].tolist() == [0, 16]


@torch.no_grad()
@pytest.mark.parametrize("converted", [False, True])
def test_a_changed_document_leaves_the_other_one_in_its_row_as_it_was(converted):
    model = tiny_model()
    if converted:
        model = move_queries(hf.convert(model, num_blocks=3))
    assert keeps_apart(model)
    row = pack([Tokens(np.arange(6), np.ones(6, bool)), Tokens(np.arange(20, 26), np.ones(6, bool))], 12, 0, True)[0]
    inputs = {"input_ids": row["input_ids"][None], "position_ids": row["position_ids"][None], "use_cache": False}
    before = model(**inputs).logits[0]
    inputs["input_ids"] = inputs["input_ids"].clone()
    inputs["input_ids"][0, 2] = 77
    after = model(**inputs).logits[0]
    assert torch.equal(after[6:], before[6:]) and not torch.allclose(after[2:6], before[2:6])


def test_a_model_that_does_not_heed_positions_is_found_out():
    model = tiny_model()
    plain = type(model).forward

    def forward(self, input_ids, position_ids=None, **rest):
        return plain(self, input_ids, **rest)

    model.forward = types.MethodType(forward, model)
    assert LENGTH > 1 and not keeps_apart(model)
    model.forward = types.MethodType(lambda self, input_ids, use_cache: plain(self, input_ids), model)
    assert not keeps_apart(model)


def test_whole_documents_are_held_out_in_the_models_own_tokens(tmp_path, monkeypatch):
    monkeypatch.setenv("ATTNRES_CACHE", str(tmp_path / "cache"))
    (tmp_path / "texts").mkdir()
    written = {f"{word} {i} <|im_end|> é" for i, word in enumerate(WORDS)}
    for i, text in enumerate(sorted(written)):
        (tmp_path / "texts" / f"{i}.txt").write_text(text)
    tokenizer = byte_tokenizer()
    name, train, held_out = documents(str(tmp_path / "texts"), tokenizer, "text")
    assert name == "texts" and train and held_out
    assert all(document[-1] == tokenizer.eos_token_id for document in [*train, *held_out])
    found = [tokenizer.decode(document[:-1]) for document in [*train, *held_out]]
    assert sorted(found) == sorted(written)  # a special token that a text spells stays text
    assert max(max(document) for document in train) <= 256


def test_of_few_documents_the_last_whole_one_is_held_out_and_of_one_its_end(tmp_path, monkeypatch):
    monkeypatch.setenv("ATTNRES_CACHE", str(tmp_path / "cache"))
    tokenizer = byte_tokenizer()
    for count, expected in ((2, (["aaaa" * 9], ["bbbb" * 9])), (1, None)):
        folder = tmp_path / str(count)
        folder.mkdir()
        for name in "ab"[:count]:
            (folder / f"{name}.txt").write_text(4 * name * 9)
        _, *sides = documents(str(folder), tokenizer, "text")
        found = tuple([tokenizer.decode(d, skip_special_tokens=True) for d in side] for side in sides)
        if expected:
            assert found == expected
        else:
            assert "".join([*found[0], *found[1]]) == "aaaa" * 9 and all(found)


def test_documents_begin_with_what_the_tokenizer_puts_in_front(tmp_path, monkeypatch):
    from tokenizers.processors import TemplateProcessing

    monkeypatch.setenv("ATTNRES_CACHE", str(tmp_path / "cache"))
    tokenizer = byte_tokenizer()
    tokenizer.bos_token = "<|im_start|>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", tokenizer.bos_token_id)]
    )
    (tmp_path / "a.txt").write_text("abc" * 30)
    _, train, _ = documents(str(tmp_path / "a.txt"), tokenizer, "text")
    assert train[0][0] == tokenizer.bos_token_id and train[0][1] == 97


def test_a_loss_that_is_not_finite_ends_the_run():
    model = tiny_model()
    model.lm_head.weight.data.fill_(torch.nan)
    with pytest.raises(Failure, match="the held-out loss is nan; lower --lr"):
        losses(model, pack(sequences(8, 8), 8, 0, True), 2, torch.device("cpu"), torch.float32)
