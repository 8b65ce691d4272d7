"""Texts as sequences in the model's own tokens, whole documents held out."""

from __future__ import annotations

from collections.abc import Iterator
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from ..data.corpus import Corpus, load_corpus
from ..errors import UsageError
from .rows import Tokens


def documents(data: str, tokenizer: Any, text_column: str) -> tuple[str, list[np.ndarray], list[np.ndarray]]:
    """(name of the corpus, documents to train on, documents held out), each int [N], its last token their end.

    A document starts with what the tokenizer puts in front of a text. What spells a special token in a text stays text.
    Which documents are held out is decided as in `load_corpus`; of a single one it is the end.

    Args:
        data, text_column: as `load_corpus` takes them.
        tokenizer: transformers' own, of the library tokenizers.

    Raises UsageError for data that cannot be had, and for another kind of tokenizer.
    """
    if not tokenizer.is_fast:
        raise UsageError("the model's tokenizer must be one of the library tokenizers, to be used on a corpus")
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        corpus = load_corpus(data, folder, text_column=text_column)
    train, held_out = _whole_documents(corpus)
    begin = tokenizer.bos_token_id
    start = np.array([begin] if tokenizer("a").input_ids[:1] == [begin] else [], np.int64)
    end = corpus.tokenizer.end_of_document
    left = 0 if end in tokenizer.get_vocab().values() else 1  # an end that the model does not know

    def as_the_model_has_them(found: list[np.ndarray]) -> list[np.ndarray]:
        texts = (np.concatenate([start, text[: len(text) - left]]).astype(np.int32) for text in found)
        return [text for text in texts if len(text) > 1]

    return corpus.name, as_the_model_has_them(train), as_the_model_has_them(held_out)


def cut(document: np.ndarray, context: int) -> Iterator[Tokens]:
    """The document in sequences of at most `context` tokens; neighbours share one, so that every token is predicted."""
    for begin in range(0, len(document) - 1, context - 1):
        ids = document[begin : begin + context]
        yield Tokens(ids, np.arange(len(ids)) > 0)


def _whole_documents(corpus: Corpus) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """(to train on, held out). Where a corpus of several documents was cut inside one, its held-out part begins with
    the next."""
    end = corpus.tokenizer.end_of_document
    train, held_out = _documents(corpus.train, end), _documents(corpus.validation, end)
    if train and train[-1][-1] != end:
        if len(held_out) > 1:
            train[-1] = np.concatenate([train[-1], held_out.pop(0)])
        elif len(train) > 1:
            held_out[0] = np.concatenate([train.pop(), held_out[0]])
    return train, held_out


def _documents(tokens: np.ndarray, end: int) -> list[np.ndarray]:
    pieces = np.split(tokens, np.flatnonzero(tokens == end) + 1)
    return [piece for piece in pieces if len(piece)]
