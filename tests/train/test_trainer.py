"""Training in this process: what is not finite, full disks, damaged checkpoints, validation."""

import dataclasses
import os
import signal

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from attnres.data.corpus import load_corpus
from attnres.errors import Failure, UsageError
from attnres.model import DecoderConfig
from attnres.model.layers.feed_forward import FeedForward
from attnres.run import hardware
from attnres.run.checkpoint import load
from attnres.run.config import TrainConfig
from attnres.run.folder import newest_checkpoint, read_config
from attnres.run.opening import open as open_model
from attnres.train.journal import Journal
from attnres.train.loop import Trainer
from attnres.train.optim import OptimConfig
from attnres.train.trainer import train

from ..command_line import metrics, needs_full_device


@pytest.fixture
def config(corpus_file, tmp_path):
    model = DecoderConfig(
        vocab_size=257, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, residual="full_attnres"
    )
    return TrainConfig(
        data=str(corpus_file), cache_dir=tmp_path / "cache", out=tmp_path / "run", model=model, device="cpu",
        precision="float32", steps=6, batch_size=4, context=32, validation_tokens=160, validate_every=4, log_every=1,
        checkpoint_every=2, optim=OptimConfig(warmup_steps=2),
    )  # fmt: skip


def before_step(monkeypatch, step, action):
    take_step = Trainer._train_step

    def stepped(self, batches):
        if self.step + 1 == step:
            action(self.model)
        return take_step(self, batches)

    monkeypatch.setattr(Trainer, "_train_step", stepped)


def poison_weight(model):
    model.layers[2].q_proj.weight.data[3, 5] = float("nan")


def poison_gradient(model):
    model.layers[1].up_proj.weight.register_hook(lambda gradient: gradient * float("inf"))
    model.layers[2].v_proj.weight.register_hook(lambda gradient: gradient * float("nan"))


@pytest.mark.parametrize(
    ("action", "words"),
    [
        (poison_weight, ["loss is nan", "layer 2 (attention of Transformer block 1)", "layers.2.q_proj.weight"]),
        (poison_gradient, ["gradient norm is", "layer 2 (attention of Transformer block 1)", "layers.2.v_proj.weight"]),
    ],
)
def test_what_is_not_finite_stops_the_run_and_is_named(config, monkeypatch, action, words):
    before_step(monkeypatch, 4, action)
    with pytest.raises(Failure) as failure:
        train(config)
    for word in ["step 4: ", *words, f"the last good checkpoint is {config.out}/checkpoints/step-00000002"]:
        assert word in str(failure.value)
    assert [record["step"] for record in metrics(config.out)] == [0, 1, 2, 3]
    monkeypatch.undo()
    assert train(config, resume=True).finished


def test_a_layer_that_overflows_is_named(config, monkeypatch):
    forward = FeedForward.forward
    calls = []

    def overflow(self, *args):
        calls.append(self)
        return forward(self, *args) * (float("inf") if len(set(calls)) == 2 and calls[-1] is calls[1] else 1)

    monkeypatch.setattr(FeedForward, "forward", overflow)
    with pytest.raises(Failure, match=r"step 0: the validation loss is nan; the output of layer 3 \(MLP of Tr"):
        train(config)
    assert metrics(config.out) == []


def test_weights_that_are_not_finite_are_not_saved(config, monkeypatch):
    """Without a look at the weights the checkpoint of step 2 would be called the last good one at step 3."""
    save = Trainer._save

    def poisoned(self, journal):
        poison_weight(self.model)
        save(self, journal)

    monkeypatch.setattr(Trainer, "_save", poisoned)
    with pytest.raises(Failure, match=r"step 2: the update is not finite; .*q_proj.weight.*there is no checkpoint yet"):
        train(config)
    assert not (config.out / "checkpoints").exists()


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_nor_are_buffers(config, monkeypatch, value):
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, **experts))

    def poison(model):
        model.layers[1].correction_bias[0] = value

    before_step(monkeypatch, 2, poison)
    with pytest.raises(Failure, match=r"step 2: the .* not finite; the buffer layers\.1\.correction_bias is not; "):
        train(config)
    assert not (config.out / "checkpoints").exists()


def test_a_run_keeps_the_precision_that_its_first_machine_chose(config, monkeypatch):
    whole = dataclasses.replace(config, precision="auto", out=config.out.with_name("whole"))
    monkeypatch.setattr(hardware, "_cpu_has_bf16", lambda: False)
    train(whole)
    part = dataclasses.replace(config, precision="auto", steps=6)
    before_step(monkeypatch, 4, lambda model: os.kill(os.getpid(), signal.SIGTERM))
    assert not train(part).finished
    monkeypatch.undo()
    monkeypatch.setattr(hardware, "_cpu_has_bf16", lambda: True)
    assert read_config(config.out).precision == "float32"
    assert train(part, resume=True).finished
    assert metrics(part.out) == metrics(whole.out)
    saved = load(newest_checkpoint(part.out)).state["config"]
    assert (saved["precision"], read_config(part.out).precision) == ("float32", "float32")
    with pytest.raises(UsageError, match=r'precision \("float32" in the checkpoint, "bfloat16" now\)'):
        train(dataclasses.replace(part, precision="bfloat16"), resume=True)


OF_A_GPU = "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.11 GiB"


@pytest.mark.parametrize(
    ("allocate", "asked"),
    [
        (lambda: torch.empty(2**58, dtype=torch.uint8), "268,435,456.00 GiB"),
        (lambda: np.empty(2**60, dtype=np.uint8), "1.00 EiB"),
        (lambda: (_ for _ in ()).throw(torch.OutOfMemoryError(OF_A_GPU)), "20.00 GiB"),
    ],
)
def test_a_step_without_memory_says_what_to_lower(config, monkeypatch, allocate, asked):
    before_step(monkeypatch, 4, lambda model: allocate())
    with pytest.raises(
        Failure, match=rf"step 4 ran out of memory \(asked for {asked}\); lower --batch-size .*"
    ) as told:
        train(config)
    assert str(told.value).endswith(f"the last good checkpoint is {config.out}/checkpoints/step-00000002")
    monkeypatch.undo()
    assert train(config, resume=True).finished


@needs_full_device
def test_a_reader_who_goes_away_does_not_end_a_run(config, monkeypatch):
    monkeypatch.setattr("sys.stderr", open("/dev/full", "w"))  # noqa: SIM115
    assert train(config).finished


def test_every_validation_token_weighs_the_same(config):
    """160 tokens are five windows of 32: batches of four rows and of one."""
    trainer = Trainer(config, load_corpus(config.data, cache_dir=config.cache_dir))
    tokens = torch.from_numpy(trainer.corpus.validation.astype("int64"))
    windows = (len(tokens) - 1) // 32
    starts = [index * windows // 5 * 32 for index in range(5)]
    model = trainer.model.requires_grad_(False)
    losses = [float(F.cross_entropy(model(tokens[None, s : s + 32])[0], tokens[s + 1 : s + 33])) for s in starts]
    assert trainer._validation_loss() == pytest.approx(sum(losses) / 5, abs=1e-6)
    assert max(losses) - min(losses) > 1e-3


@needs_full_device
@pytest.mark.parametrize("file", ["metrics", "tensorboard"])
def test_a_full_disk_while_recording(config, monkeypatch, file):
    journals = []
    start = Journal.__init__
    monkeypatch.setattr(Journal, "__init__", lambda self, *args: [start(self, *args), journals.append(self)][0])

    def fill(model):
        owner, name = (journals[0], "_file") if file == "metrics" else (journals[0]._board._records, "_writer")
        setattr(owner, name, open("/dev/full", "w" if file == "metrics" else "wb"))  # noqa: SIM115

    before_step(monkeypatch, 4, fill)
    with pytest.raises(Failure, match=r"cannot write .*metrics.jsonl: No space left on device; make it writable"):
        train(config)
    monkeypatch.undo()
    assert train(config, resume=True).finished
    assert [record["step"] for record in metrics(config.out)] == [0, 1, 2, 3, 4, 4, 5, 6, 6]


def test_another_corpus_is_refused_on_resume(config, corpus_file, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(corpus_file.read_text())
    config.data, config.steps = str(text), 4
    train(config)
    before = (config.out / "metrics.jsonl").read_bytes()
    text.write_text(corpus_file.read_text().replace("query", "quarry", 1))
    with pytest.raises(UsageError, match="data is not the corpus that the checkpoint was trained on"):
        train(config, resume=True)
    assert (config.out / "metrics.jsonl").read_bytes() == before


def test_the_same_corpus_may_move_and_validation_may_change(config, corpus_file, tmp_path):
    train(dataclasses.replace(config, steps=6, out=tmp_path / "whole"))
    before_stop = dataclasses.replace(config, checkpoint_every=4)
    stop_at(before_stop, 4)
    copy = tmp_path / "elsewhere" / corpus_file.name
    copy.parent.mkdir()
    copy.write_text(corpus_file.read_text())
    moved = dataclasses.replace(config, data=str(copy), validate_every=5, validation_tokens=64)
    assert train(moved, resume=True).finished
    losses = [[r["loss"] for r in metrics(out) if "loss" in r] for out in (config.out, tmp_path / "whole")]
    assert losses[0] == losses[1]
    assert [r["step"] for r in metrics(config.out) if "val_loss" in r] == [0, 4, 5, 6]
    assert read_config(config.out).data == str(copy)


def stop_at(config, step):
    """Trains until the end of `step`, where a signal comes."""
    with pytest.MonkeyPatch.context() as patch:
        before_step(patch, step, lambda model: os.kill(os.getpid(), signal.SIGTERM))
        assert not train(config).finished


@pytest.mark.parametrize("schedule", ["constant", "wsd"])
def test_a_run_whose_rates_do_not_depend_on_its_length_can_be_extended(config, tmp_path, schedule):
    config.optim = OptimConfig(warmup_steps=2, schedule=schedule)
    whole = dataclasses.replace(config, steps=12, out=tmp_path / "whole")
    train(whole)
    if schedule == "constant":
        train(config)
    else:
        stop_at(config, 4)
    assert train(dataclasses.replace(config, steps=12), resume=True).finished
    losses = [[(r["step"], r["loss"]) for r in metrics(out) if "loss" in r] for out in (config.out, whole.out)]
    assert losses[0] == losses[1]
    with pytest.raises(UsageError, match="steps must be at least 12, which the run has taken; it is 8"):
        train(dataclasses.replace(config, steps=8), resume=True)


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_others_are_told_the_way(config, schedule):
    config.optim = OptimConfig(warmup_steps=2, schedule=schedule, decay_fraction=0.5)
    train(config)
    before = metrics(config.out), read_config(config.out)
    with pytest.raises(UsageError, match=r"steps is 6 in the checkpoint and 12 now.* --optim.schedule wsd or constant"):
        train(dataclasses.replace(config, steps=12), resume=True)
    assert (metrics(config.out), read_config(config.out)) == before


def test_damaged_checkpoints(config):
    train(config)
    newest, older = sorted((config.out / "checkpoints").iterdir(), reverse=True)
    os.truncate(newest / "model.safetensors", 1000)
    assert newest_checkpoint(config.out) == older
    expected = metrics(config.out)
    assert train(config, resume=True).finished
    assert metrics(config.out) == expected
    for folder in (newest, older):
        os.truncate(folder / "model.safetensors", 1000)
    for use in (lambda: train(config, resume=True), lambda: open_model(config.out)):
        with pytest.raises(Failure, match=r"every checkpoint in .* is damaged; start a new run"):
            use()
    assert metrics(config.out) == expected


def test_peak_memory_counts_the_processes_before_this_one(config, monkeypatch):
    monkeypatch.setattr("attnres.run.hardware.peak_memory", lambda device: 7_000)
    assert train(config).peak_memory_bytes == 7_000
    monkeypatch.setattr("attnres.run.hardware.peak_memory", lambda device: 5_000)
    assert train(config, resume=True).peak_memory_bytes == 7_000


def test_signal_handlers_come_back(config):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    config.steps = 4
    train(config)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_run_on_the_cpu_pins_no_memory(config, monkeypatch):
    """Beside a GPU, too, where that would start CUDA in every process."""
    trainer, asked = Trainer(config, load_corpus(config.data, cache_dir=config.cache_dir)), []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("attnres.data.batches.DataLoader", lambda *_, **options: asked.append(options) or [])
    iter(trainer._batches())
    assert [options["pin_memory"] for options in asked] == [False]
