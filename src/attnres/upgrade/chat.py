"""Conversations as sequences through the model's chat template, the loss on the assistant's answers alone."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import numpy as np

from ..data import records
from ..data.corpus import is_held_out
from ..data.sources import record_files
from ..errors import UsageError, first_line
from .rows import Tokens

LOGGER = logging.getLogger(__name__)
COLUMN = "messages"
FRACTION = 0.05
_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")


def has_conversations(data: str) -> bool:
    """Whether `data` names a file of records, or a folder of such files, with conversations in `messages`."""
    try:
        return any(True for path in record_files(data)[:1] for _ in records.values(path, COLUMN))
    except UsageError:  # no such column; whatever else is wrong, who reads texts will tell
        return False


def conversations(data: str, tokenizer: Any, context: int) -> tuple[list[Tokens], list[Tokens]]:
    """(to train on, held out): the conversations of files of records, each at most `context` tokens of it.

    What is held out is a matter of what is said, so that equal conversations are on one side; of very few it is the
    last. A conversation without an answer in its first `context` tokens is left out.

    Raises UsageError for a record that is no conversation, a template that is missing or does not render one, and where
    no answer is found.
    """
    check_template(tokenizer)
    train: list[Tokens] = []
    held_out: list[Tokens] = []
    cut = without = lost = 0
    for path in record_files(data):
        for place, messages in records.values(path, COLUMN):
            tokens, missing = rendered(messages, tokenizer, place)
            lost += missing
            cut += len(tokens.ids) > context
            tokens = Tokens(tokens.ids[:context], tokens.scored[:context])
            if not tokens.scored[1:].any():
                without += 1
                continue
            side = held_out if is_held_out(json.dumps(messages, sort_keys=True).encode(), FRACTION) else train
            side.append(tokens)
    if not train and not held_out:
        raise UsageError(f"--data {data} has no conversation with an answer of the assistant in {context} tokens")
    if not (train and held_out):
        both = train + held_out
        last = max(1, round(len(both) * FRACTION))
        train, held_out = both[:-last], both[-last:]
    for count, what in (
        (cut, f"conversations are cut to {context} tokens"),
        (without, "conversations are left out: no answer is in what is kept of them"),
        (lost, "answers are not trained on: the chat template renders them otherwise once more is said"),
    ):
        if count:
            LOGGER.warning("%s: %d %s", Path(data).name, count, what)
    return train, held_out


def check_template(tokenizer: Any) -> None:
    """Raises UsageError unless conversations can be rendered and the tokens of their answers found."""
    if not tokenizer.chat_template:
        raise UsageError("the model's tokenizer has no chat template; set tokenizer.chat_template, or give texts")
    if not tokenizer.is_fast:
        raise UsageError("the model's tokenizer must be one of the library tokenizers, to find answers with")


def rendered(messages: Any, tokenizer: Any, place: str) -> tuple[Tokens, int]:
    """(a conversation's tokens, scored where they are an answer of the assistant; the answers that could not be found).

    Templates with generation markers say what an answer is. For others it is what they add to the conversation before,
    its opening for an answer included, up to the special token that ends the turn.
    """
    is_list = isinstance(messages, list) and len(messages) > 0
    if not is_list or not all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in messages):
        raise UsageError(f"{place} must be a list of messages, each an object with role and content")
    if _MARKED.search(tokenizer.get_chat_template()):
        try:
            found = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        except Exception as error:  # whatever a template raises
            raise UsageError(f"the chat template cannot render {place}: {first_line(error)}") from error
        return Tokens(np.array(found["input_ids"], np.int32), np.array(found["assistant_masks"], np.bool_)), 0
    try:
        text = _text(messages, tokenizer)
    except Exception as error:
        raise UsageError(f"the chat template cannot render {place}: {first_line(error)}") from error
    spans = [_answer(messages, i, text, tokenizer) for i, m in enumerate(messages) if m["role"] == "assistant"]
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    places = np.array(encoded["offset_mapping"], np.int64).reshape(-1, 2)
    scored = np.zeros(len(places), np.bool_)
    for begin, end in (span for span in spans if span):
        scored |= (places[:, 0] >= begin) & (places[:, 1] <= end) & (places[:, 1] > places[:, 0])
    return Tokens(np.array(encoded["input_ids"], np.int32), scored), spans.count(None)


def _answer(messages: list[Any], i: int, text: str, tokenizer: Any) -> tuple[int, int] | None:
    """Where message i stands in the text of the conversation; None if the template does not keep what came before."""
    try:
        before = _text(messages[:i], tokenizer, add_generation_prompt=True)
        behind = _text(messages[: i + 1], tokenizer)
    except Exception:  # a conversation that must not end or begin there
        return None
    if not (text.startswith(behind) and behind.startswith(before)):
        return None
    ended = behind.rstrip()  # a line behind the end of a turn belongs to no answer
    if any(ended.endswith(token) for token in tokenizer.get_added_vocab()):
        behind = ended
    return len(before), len(behind)


def _text(messages: list[Any], tokenizer: Any, **options: Any) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, **options)
