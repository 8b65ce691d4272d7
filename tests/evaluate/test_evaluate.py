"""Evaluation: perplexity against a hand computation, lm-eval on local tasks, and what is refused."""

import json
import math
import shutil
import sys

import pytest
import torch
from torch.nn import functional as F

from attnres.data.tokenizer import ByteTokenizer
from attnres.errors import Failure, UsageError

pytest.importorskip("transformers")
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from attnres import run
from attnres.evaluate.perplexity import perplexity
from attnres.evaluate.tasks import evaluate, run_tasks, table
from attnres.hf import AttnResConfig, AttnResForCausalLM, convert

TEXT = "A residual connection is how information travels over depth. Größe: 17 µm.\n" * 2
SHAPE = dict(vocab_size=257, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=64)


def open_model(folder):
    return run.open(folder, transformers=True, pretrained=True)[:2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A native model with random weights and its tokenizer, on disk."""
    path = tmp_path_factory.mktemp("native")
    torch.manual_seed(0)
    AttnResForCausalLM(AttnResConfig(**SHAPE, initializer_range=0.2)).save_pretrained(path)
    ByteTokenizer().save(path)
    return path


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def test_perplexity_of_one_window_is_the_mean_loss(folder, tmp_path):
    path = tmp_path / "short.txt"
    path.write_bytes("né\n\ufffd".encode())
    model, tokenizer = open_model(folder)
    ids = torch.tensor([[256, *"né\n\ufffd".encode()]], device=model.device)
    with torch.no_grad():
        loss = F.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:]).item()
    got = perplexity(model, tokenizer, path)
    assert (got["tokens"], got["bytes"]) == (7, 7)
    assert got["loss"] == pytest.approx(loss, rel=1e-5)
    assert got["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
    assert got["bits_per_byte"] == pytest.approx(loss / math.log(2), rel=1e-5)


@pytest.mark.parametrize(("context", "stride"), [(16, 16), (16, 5), (64, 1), (7, 3)])
def test_windows_score_every_token_once(folder, data, context, stride):
    model, tokenizer = open_model(folder)
    ids = [256, *TEXT.encode()]
    total, reached = 0.0, 0
    last = len(ids) - 1 - context
    for begin in [*range(0, last, stride), last]:
        window = torch.tensor([ids[begin : begin + context + 1]], device=model.device)
        with torch.no_grad():
            losses = F.cross_entropy(model(window[:, :-1]).logits[0], window[0, 1:], reduction="none")
        total += losses[reached - begin :].sum().item()
        reached = begin + context
    assert reached == len(TEXT.encode())
    got = perplexity(model, tokenizer, data, context=context, stride=stride, batch_size=3)
    assert got["tokens"] == len(TEXT.encode())
    assert got["loss"] == pytest.approx(total / got["tokens"], rel=1e-5)


def test_a_tokenizer_without_special_tokens_gives_the_first_token(folder, data):
    model, tokenizer = open_model(folder)
    tokenizer.eos_token = None
    got = perplexity(model, tokenizer, data)
    assert got["tokens"] == got["bytes"] == len(TEXT.encode()) - 1


@pytest.mark.parametrize("context", [1, 2, 64])
def test_without_special_tokens_the_whole_first_character_is_given(folder, tmp_path, context):
    path = tmp_path / "short.txt"
    model, tokenizer = open_model(folder)
    tokenizer.eos_token = None
    for text in ("é", "漢"):
        path.write_text(text)
        with pytest.raises(UsageError, match="has no token to predict"):
            perplexity(model, tokenizer, path)
    path.write_text("漢é")
    ids = torch.tensor([list("漢é".encode())])
    losses = []
    for end in (3, 4):
        with torch.no_grad():
            logits = model(ids[:, max(0, end - context) : end]).logits[0, -1]
        losses.append(F.cross_entropy(logits, ids[0, end]).item())
    got = perplexity(model, tokenizer, path, context=context, stride=1)
    assert (got["tokens"], got["bytes"]) == (2, 2)
    assert got["loss"] == pytest.approx(sum(losses) / 2, rel=1e-5)
    assert got["bits_per_byte"] == pytest.approx(got["loss"] / math.log(2))


def test_text_that_is_not_utf8_is_refused(folder, tmp_path):
    path = tmp_path / "latin.txt"
    path.write_bytes("né".encode("latin-1"))
    with pytest.raises(UsageError, match=r"data .*latin.txt is not UTF-8 \(byte 0xe9\); convert it, .*iconv -f LATIN1"):
        evaluate(str(folder), data=path)
    path.write_text("né", encoding="utf-8-sig")
    assert evaluate(str(folder), data=path)["data"]["bytes"] == 3


def test_a_tokenizer_that_knows_more_tokens_than_the_model_is_refused(folder, data, tmp_path):
    shape = {**SHAPE, "vocab_size": 256}
    LlamaForCausalLM(LlamaConfig(**shape, intermediate_size=64)).save_pretrained(tmp_path)
    ByteTokenizer().save(tmp_path)
    with pytest.raises(UsageError, match=r"knows 257 tokens and the model 256; .*resize_token_embeddings\(257\)"):
        evaluate(str(tmp_path), data=data)


@pytest.mark.parametrize("damage", ["missing", "empty", "cut"])
def test_a_damaged_shard_is_one_sentence(data, tmp_path, damage):
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, intermediate_size=64))
    model.save_pretrained(tmp_path, max_shard_size=20_000)
    ByteTokenizer().save(tmp_path)
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    content = shard.read_bytes()
    shard.unlink() if damage == "missing" else shard.write_bytes(content[: 0 if damage == "empty" else -9])
    with pytest.raises(
        (UsageError, Failure), match=r"cannot be loaded: .*model-00002|a weight file in .* is damaged"
    ) as caught:
        evaluate(str(tmp_path), data=data)
    assert "\n" not in str(caught.value)


DEEP = "[" * 100_000


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"])
def test_json_nested_too_deeply_is_one_sentence(folder, data, tmp_path, name):
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / name).write_text(f'{{"a": {DEEP}')
    with pytest.raises((UsageError, Failure)) as caught:
        evaluate(str(copy), data=data)
    assert str(copy) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"context": 65}, "context must be from 1 to the model's 64 tokens"),
        ({"context": 8, "stride": 9}, "stride must be from 1 to context"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
    ],
)
def test_windows_that_do_not_fit_are_refused(folder, data, arguments, message):
    with pytest.raises(UsageError, match=message):
        perplexity(*open_model(folder), data, **arguments)


def test_a_model_that_computes_nan_fails(folder, data):
    model, tokenizer = open_model(folder)
    torch.nn.init.constant_(model.lm_head.weight, math.nan)
    with pytest.raises(Failure, match=r"the loss on .* is nan"):
        perplexity(model, tokenizer, data)


def test_plain_and_converted_models_evaluate_alike(tmp_path, data):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, intermediate_size=64, initializer_range=0.2))
    for name in ("plain", "converted"):
        ByteTokenizer().save(tmp_path / name)
    model.save_pretrained(tmp_path / "plain")
    convert(model, num_blocks=2).save_pretrained(tmp_path / "converted")
    plain, converted = (evaluate(str(tmp_path / name), data=data) for name in ("plain", "converted"))
    assert converted["data"]["loss"] == pytest.approx(plain["data"]["loss"], rel=1e-5)


def choice_scores(model, i):
    """Log-likelihood of " a" and " b" behind the prompt of document i."""
    scores = []
    for option in "ab":
        ids = torch.tensor([[*f"{i}: {option}".encode()]], device=model.device)
        with torch.no_grad():
            losses = F.cross_entropy(model(ids[:, :-1]).logits[0], ids[0, 1:], reduction="none")
        scores.append(-losses[1:].sum().item())
    return scores


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory):
    """Two lm-eval tasks on local files: a choice of two options, and generation."""
    path = tmp_path_factory.mktemp("tasks")
    documents = [{"text": f"{i}:", "options": ["a", "b"], "label": i % 2} for i in range(6)]
    (path / "data.jsonl").write_text("\n".join(map(json.dumps, documents)))
    files = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(path / "data.jsonl")}}}
    common = {**files, "test_split": "test", "doc_to_text": "{{text}}", "metadata": {"version": 1.0}}
    choice = {"task": "tiny_choice", "output_type": "multiple_choice", "doc_to_choice": "options"}
    choice |= {"doc_to_target": "label", "metric_list": [{"metric": "acc"}]}
    writing = {"task": "tiny_writing", "output_type": "generate_until", "doc_to_target": "{{options[0]}}"}
    writing |= {"generation_kwargs": {"until": ["\n"], "max_gen_toks": 3}, "metric_list": [{"metric": "exact_match"}]}
    for task in (choice, writing):
        (path / f"{task['task']}.yaml").write_text(json.dumps({**common, **task}))
    return path


def test_lm_eval_runs_on_a_native_model(folder, data, task_folder, tmp_path):
    pytest.importorskip("lm_eval")
    results = evaluate(
        str(folder),
        tasks=["tiny_*"],
        data=data,
        out=tmp_path / "out",
        include_path=task_folder,
        batch_size=4,
    )
    model, _ = open_model(folder)
    right = sum((b > a) == bool(i % 2) for i, (a, b) in enumerate(choice_scores(model, i) for i in range(6)))
    scores = results["tasks"]["results"]
    assert scores["tiny_choice"]["acc,none"] == pytest.approx(right / 6)
    assert scores["tiny_writing"]["exact_match,none"] == 0.0
    assert results["tasks"]["n-samples"]["tiny_choice"]["effective"] == 6
    assert json.loads((tmp_path / "out" / "results.json").read_text())["data"] == results["data"]
    lines = table(results).splitlines()
    assert len(lines) == 5 and any("tiny_choice" in line and " acc " in line for line in lines)


def test_bad_requests_are_refused(folder, data, task_folder, tmp_path, monkeypatch):
    for arguments, message in [
        ({}, "give --tasks, --data or both"),
        ({"data": tmp_path / "none.txt"}, "cannot be read: No such file"),
        ({"data": data, "dtype": "float17"}, "dtype must be auto or a torch dtype"),
        ({"data": data, "device": "cuda:77"}, "device 'cuda:77' cannot be used"),
    ]:
        with pytest.raises(UsageError, match=message):
            evaluate(str(folder), **arguments)
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(UsageError, match="is empty"):
        evaluate(str(folder), data=tmp_path / "empty.txt")
    with pytest.raises(UsageError, match="is no model"):
        evaluate(str(tmp_path), data=data)
    AutoTokenizer.from_pretrained(folder)  # the tokenizer is there, so only its absence elsewhere can be the reason
    AttnResForCausalLM(AttnResConfig(**SHAPE)).save_pretrained(tmp_path / "bare")
    with pytest.raises(UsageError, match="has no tokenizer"):
        evaluate(str(tmp_path / "bare"), data=data)
    with pytest.raises(Failure, match="cannot write"):
        evaluate(str(folder), data=data, out=data)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UsageError, match=r"pip install 'attnres\[eval\]'"):
        evaluate(str(folder), tasks=["tiny_choice"], include_path=task_folder)


def test_unknown_tasks_and_missing_task_data_are_named(folder, task_folder, tmp_path, monkeypatch):
    tasks = pytest.importorskip("lm_eval.tasks")
    whole = tasks.TaskManager
    # lm-eval's own definitions take long to read
    monkeypatch.setattr(
        tasks,
        "TaskManager",
        lambda include_path=None, include_defaults=False: whole(include_path=include_path, include_defaults=False),
    )
    model, tokenizer = open_model(folder)
    with pytest.raises(UsageError, match="'tiny_chioce' is unknown to lm-eval; did you mean tiny_choice"):
        run_tasks(model, tokenizer, ["tiny_chioce"], include_path=task_folder)
    with pytest.raises(UsageError, match="include_path must be a folder"):
        run_tasks(model, tokenizer, ["tiny_choice"], include_path=tmp_path / "none")
    definition = json.loads((task_folder / "tiny_choice.yaml").read_text())
    definition["dataset_kwargs"]["data_files"]["test"] = str(tmp_path / "gone.jsonl")
    (tmp_path / "tiny_gone.yaml").write_text(json.dumps({**definition, "task": "tiny_gone"}))
    with pytest.raises(Failure, match="the data of tiny_gone cannot be loaded"):
        run_tasks(model, tokenizer, ["tiny_gone"], include_path=tmp_path)
