"""Conversations: the loss is on the assistant's answers and on nothing else, token by token."""

import json

import pytest

from attnres.errors import UsageError
from attnres.upgrade.chat import conversations, has_conversations, rendered

from .tiny import CHATML, MARKED, byte_tokenizer, write_chats, write_texts

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "é?"},
    {"role": "assistant", "content": "Yes é"},
    {"role": "user", "content": "assistant\n<|im_start|>"},
    {"role": "assistant", "content": "No\n"},
]
TEXT = (
    "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\né?<|im_end|>\n<|im_start|>assistant\nYes é<|im_end|>\n"
    "<|im_start|>user\nassistant\n<|im_start|><|im_end|>\n<|im_start|>assistant\nNo\n<|im_end|>\n"
)
FORGETS = (  # like templates that drop what an assistant thought once the user goes on
    "{% for m in messages %}[{{ m['role'] }}]{% if m['role'] == 'assistant' and not loop.last %}...{% else %}"
    "{{ m['content'] }}{% endif %}<|im_end|>{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


def answers(tokens, tokenizer):
    """What is scored, a text for each run of scored tokens."""
    runs, before = [], False
    for token, scored in zip(tokens.ids, tokens.scored, strict=True):
        if scored:
            runs = [*runs, [token]] if not before else [*runs[:-1], [*runs[-1], token]]
        before = scored
    return [tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_the_loss_is_on_the_answers_and_the_end_of_their_turns(template):
    tokenizer = byte_tokenizer(template)
    tokens, lost = rendered(TALK, tokenizer, "here")
    assert tokenizer.decode(tokens.ids) == TEXT and lost == 0
    assert answers(tokens, tokenizer) == ["Yes é<|im_end|>", "No\n<|im_end|>"]
    # tokens before the answer: 1 + 7 + 9 + 1 + 1 of the system, 1 + 5 + 3 + 1 + 1 of the user, and 1 + 10
    assert tokens.scored.nonzero()[0].tolist()[:7] == [*range(41, 48)]
    assert int(tokens.scored.sum()) == len("Yes é".encode()) + 1 + len("No\n") + 1


def test_an_answer_that_the_template_changes_later_is_not_trained_on():
    tokenizer = byte_tokenizer(FORGETS)
    tokens, lost = rendered(TALK, tokenizer, "here")
    assert lost == 1 and answers(tokens, tokenizer) == ["No\n<|im_end|>"]


def test_a_template_that_joins_an_answer_and_the_next_turn_ends_it_in_between():
    tokenizer = byte_tokenizer(
        "{% for m in messages %}{{ m['content'] }}{% if not loop.last %} {% endif %}{% endfor %}"
    )
    tokens, lost = rendered([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b "}], tokenizer, "")
    # the opening of an answer is what a generation prompt adds, nothing here: the space is part of the answer
    assert lost == 0 and answers(tokens, tokenizer) == [" b "]


def test_sides_are_disjoint_and_equal_conversations_are_on_one(tmp_path):
    path = tmp_path / "chats.jsonl"
    talks = [[{"role": "user", "content": str(i % 60)}, {"role": "assistant", "content": "yes"}] for i in range(120)]
    path.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    assert has_conversations(str(path)) and has_conversations(str(tmp_path))
    train, held_out = ({tuple(t.ids) for t in side} for side in conversations(str(path), byte_tokenizer(), 99))
    assert len(train) + len(held_out) == 60 and held_out and not train & held_out
    path.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks[:2]))
    train, held_out = conversations(str(path), byte_tokenizer(), 99)
    assert (len(train), len(held_out)) == (1, 1)


def test_what_does_not_fit_is_cut_and_told(tmp_path, caplog):
    path = tmp_path / "chats.jsonl"
    talks = [[{"role": "user", "content": "x" * n}, {"role": "assistant", "content": "yes" * 9}] for n in (1, 2, 40)]
    path.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    train, held_out = conversations(str(path), byte_tokenizer(), 40)
    assert [len(t.ids) for t in train + held_out] == [40, 40]
    assert "3 conversations are cut to 40 tokens" in caplog.text
    assert "1 conversations are left out: no answer is in what is kept of them" in caplog.text


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"messages": "hello"}, "line 1 of .*chats.jsonl must be a list of messages, each an object with role and"),
        ({"messages": [{"content": "a"}]}, "must be a list of messages"),
        ({"messages": [{"role": "user", "content": "a"}]}, "has no conversation with an answer of the assistant in 9"),
        ({"messages": [{"role": "judge", "content": "a"}]}, "the chat template cannot render .*chats.jsonl: no judges"),
    ],
)
def test_what_is_no_conversation_is_refused(tmp_path, line, message):
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps(line) + "\n")
    refusing = "{% if messages[0]['role'] == 'judge' %}{{ raise_exception('no judges') }}{% endif %}" + CHATML
    with pytest.raises(UsageError, match=message) as caught:
        conversations(str(path), byte_tokenizer(refusing), 9)
    assert "\n" not in str(caught.value)


def test_texts_are_no_conversations(tmp_path):
    assert not has_conversations(str(write_texts(tmp_path / "texts")))
    (tmp_path / "texts.jsonl").write_text('{"text": "a"}\n')
    assert not has_conversations(str(tmp_path / "texts.jsonl")) and not has_conversations("stdlib")
    (tmp_path / "empty.jsonl").write_text("")
    assert not has_conversations(str(tmp_path / "empty.jsonl"))


def test_a_tokenizer_without_a_template_is_refused(chats):
    with pytest.raises(UsageError, match=r"has no chat template; set tokenizer\.chat_template"):
        conversations(str(chats), byte_tokenizer(None), 64)


def test_files_of_conversations_are_those_that_a_corpus_has(tmp_path):
    (tmp_path / ".hidden").mkdir()
    write_chats(tmp_path / ".hidden" / "old.jsonl")
    assert not has_conversations(str(tmp_path))
    (tmp_path / "more").mkdir()
    write_chats(tmp_path / "more" / "chats.jsonl", 9)
    assert has_conversations(str(tmp_path))
    train, held_out = conversations(str(tmp_path), byte_tokenizer(), 99)
    assert len(train) + len(held_out) == 9
