"""The flags of every command: none that there was gets lost, and what a plan takes for a run is what training takes."""

import re
from pathlib import Path

import pytest
import torch

from attnres import cli
from attnres.commands import plan
from attnres.parallel.config import ParallelConfig
from attnres.run.config import TrainConfig
from attnres.run.folder import read_config

from .test_cli import plain

RECORDED = re.findall(r"^(\w[\w ]*):\n((?:  .*\n)*)", Path(__file__).with_name("flags.txt").read_text(), re.M)


@pytest.mark.parametrize(("command", "recorded"), RECORDED, ids=[command for command, _ in RECORDED])
def test_flags_and_defaults_are_there(command, recorded, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as end:
        cli.main([*command.split(), "--help"])
    assert not end.value.code
    shown = plain(capsys.readouterr().out).partition(" options: ")[2]
    entry = r"(--[a-z0-9.-]+)(?:, --\S+)? (?:(?!\(default: |\(required\)).)*\(default: (.*?)\)(?= --|$| \w+ options:)"
    entries = {flag: re.sub("[ _]", "", default) for flag, default in re.findall(entry, shown)}
    expected = dict(word.split("=") for word in recorded.replace("_", "").split())
    assert {flag: entries.get(flag) for flag in expected} == expected


@pytest.fixture
def planned(monkeypatch):
    """planned(*argv) -> the arguments of the plan that the command would make."""

    class Planned(Exception):
        pass

    def make(*arguments):
        raise Planned(*arguments)

    def planned(*argv):
        with pytest.raises(Planned) as made:
            plan.run([str(word) for word in argv])
        return made.value.args

    monkeypatch.setattr(plan, "plan", make)
    return planned


def test_a_plan_is_of_the_run_that_train_would_start(planned):
    run = ["--tokenizer", "train:300", "--batch-size", 4, "--optim.lr", 0.1, "--residual.num-blocks", 3, "--keep", 1]
    model, split, batch, context, precision, checkpointing, _ = planned(*run)
    assert (model.vocab_size, model.residual_options, model.hidden_size) == (300, {"num_blocks": 3}, 128)
    assert (split, batch, context) == (ParallelConfig(), 4, TrainConfig().context)
    assert (precision, checkpointing) == (torch.bfloat16, False)
    assert planned("--context", 4096)[3] == 4096


def test_a_plan_is_of_the_run_of_a_folder(planned, finished_run):
    saved = read_config(finished_run)
    model, split, batch, context, *_ = planned(finished_run)
    assert (model, split, batch, context) == (saved.model, saved.parallel, saved.batch_size, saved.context)
    assert planned("--resume", "--out", finished_run) == planned(finished_run)
    assert planned(finished_run, "--batch-size", 64, "--model.hidden-size", 64)[0].hidden_size == 64
