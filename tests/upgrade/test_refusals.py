"""What an upgrade refuses: one sentence that names the argument and the mend, before anything is trained."""

import dataclasses
import json
import shutil

import pytest
import torch

from attnres import hf
from attnres.errors import Failure, UsageError
from attnres.run import hardware
from attnres.upgrade import UpgradeConfig, conduct, models, upgrade

from .tiny import byte_tokenizer, tiny_model, write_model


@pytest.fixture(autouse=True)
def nothing_is_run(monkeypatch, tmp_path):
    monkeypatch.setenv("ATTNRES_CACHE", str(tmp_path / "cache"))

    def run_grid(*args, **options):
        raise AssertionError("a process would have been started")

    monkeypatch.setattr(conduct, "run_grid", run_grid)


def refused(message, model, data, out, **options):
    with pytest.raises(UsageError, match=message) as caught:
        upgrade(UpgradeConfig(**{"model": str(model), "data": str(data), "out": out, "context": 32, **options}))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train": "some"}, "train must be one of all, lora, residual; it is 'some'"),
        ({"train": "residual", "lr": 1e-3}, "lr is for weights, of which .* trains none; give query_lr instead"),
        ({"residual": ()}, "residual must name at least one, each once; it is ''"),
        ({"seeds": (1, 1)}, "seeds must name at least one, each once; it is '1, 1'"),
        ({"residual": ("blok",)}, "residual 'blok' is unknown; did you mean 'block_attnres'"),
        ({"residual": ("full_attnres",), "num_blocks": 2}, "num_blocks is an option of none of full_attnres"),
        ({"steps": 0}, "steps must be a positive whole number; it is 0"),
        ({"context": 1}, "context must be a whole number of at least 2; it is 1"),
        ({"validation_tokens": 40}, "validation_tokens must be a whole number of at least 64; it is 40"),
        ({"context": 65}, "context must be at most the model's 64 tokens; it is 65"),
        ({"lr": 0.0}, "lr must be a positive number; it is 0.0"),
        ({"warmup_steps": -1}, "warmup_steps must be a non-negative whole number; it is -1"),
    ],
)
def test_values_out_of_range(model, texts, tmp_path, options, message):
    refused(message, model, texts, tmp_path / "out", **options)


def test_a_model_that_cannot_be_upgraded(model, texts, tmp_path):
    refused("nowhere is no model", tmp_path / "nowhere", texts, tmp_path / "out")
    bare = tmp_path / "bare"
    tiny_model().save_pretrained(bare)
    refused(r"bare has no tokenizer; save it there with tokenizer\.save_pretrained", bare, texts, tmp_path / "out1")
    converted = tmp_path / "converted"
    hf.convert(tiny_model()).save_pretrained(converted)
    refused("is converted: it has Attention Residuals already; give a plain one", converted, texts, tmp_path / "out2")
    large = byte_tokenizer()
    large.add_tokens([f"more{i}" for i in range(99)])
    refused("knows 358 tokens and the model 272", write_model(tmp_path / "l", large), texts, tmp_path / "out3")


def test_data_that_cannot_be_trained_on(model, texts, chats, tmp_path):
    (tmp_path / "empty.txt").touch()
    refused("empty.txt is empty; give a corpus with text", model, tmp_path / "empty.txt", tmp_path / "out")
    (tmp_path / "little.txt").write_text("little " * 40)
    little = (
        r"little.txt is too little: it makes 9 rows of 32 tokens to train on, and at least 16 are needed; give more"
    )
    refused(little, model, tmp_path / "little.txt", tmp_path / "out", batch_size=8, accumulate=2)
    few = "it makes 1 rows of 32 tokens held out, and at least 2 are needed"
    refused(few, model, tmp_path / "little.txt", tmp_path / "out", batch_size=1)
    refused("nowhere.jsonl' does not exist", model, tmp_path / "nowhere.jsonl", tmp_path / "out")
    plain = write_model(tmp_path / "plain", byte_tokenizer(None))
    refused("has no chat template", plain, chats, tmp_path / "out1")


def test_a_folder_of_something_else(model, texts, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    refused("out must be a new folder, or that of this upgrade; .* has .* in it", model, texts, tmp_path)
    out = tmp_path / "out"
    with pytest.raises(AssertionError, match="would have been started"):
        upgrade(UpgradeConfig(str(model), str(texts), out=out, context=32))
    refused(f"out holds another upgrade: {out} has lr None, and this command has 0.001", model, texts, out, lr=1e-3)
    assert json.loads((out / "upgrade.json").read_text())["context"] == 32
    shutil.copy(out / "upgrade.json", tmp_path / "saved")
    with pytest.raises(AssertionError, match="would have been started"):  # nothing of this changes a result
        upgrade(UpgradeConfig(str(model), str(texts), out=out, context=32, checkpoint_every=3, device="cpu"))


def test_a_folder_that_was_begun_in_another_precision(model, texts, tmp_path, monkeypatch):
    """With precision left open an upgrade is of the machine that began it: its arms must not differ in that."""
    begun = UpgradeConfig(str(model), str(texts), out=tmp_path / "out", context=32, device="cpu")
    monkeypatch.setattr(hardware, "_cpu_has_bf16", lambda: True)
    with pytest.raises(AssertionError, match="would have been started"):
        upgrade(begun)
    monkeypatch.setattr(hardware, "_cpu_has_bf16", lambda: False)
    refused("has precision 'bfloat16', and this command has 'float32'", model, texts, begun.out, device="cpu")
    with pytest.raises(AssertionError, match="would have been started"):
        upgrade(dataclasses.replace(begun, precision="bfloat16"))


def test_packages_that_are_missing(monkeypatch, model, texts, tmp_path):
    monkeypatch.setattr(models, "find_spec", lambda name: None if name == "peft" else object())
    refused("train='lora' needs the package peft; run: pip install peft", model, texts, tmp_path, train="lora")
    monkeypatch.setattr(models, "find_spec", lambda name: None)
    refused(r"needs the package accelerate; run: pip install 'attnres\[hf\]'", model, texts, tmp_path)
    monkeypatch.undo()
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused("call it without torchrun", model, texts, tmp_path)


def test_a_run_that_does_not_fit_memory(model, texts, tmp_path, monkeypatch):
    def run_grid(cells, measure, **options):
        if measure is conduct.prove:
            return [{"packed": True, "conversions": {}}]
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(conduct, "run_grid", run_grid)
    with pytest.raises(Failure, match=r"does not fit memory \(asked for 2\.00 GiB\); lower --batch-size"):
        upgrade(UpgradeConfig(str(model), str(texts), out=tmp_path / "out", context=32))
