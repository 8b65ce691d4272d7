"""A run that is stopped or killed: what it leaves, and that it goes on as if nothing had been."""

import shutil

import pytest
import torch

from attnres.run import checkpoint
from attnres.run.folder import newest_checkpoint

from ..command_line import AT_STEP, IN_SAVE, kill, metrics


def saved(out):
    return newest_checkpoint(out).name


def assert_same_run(run, other):
    assert metrics(run) == metrics(other)
    ours, theirs = (checkpoint.load(newest_checkpoint(out)) for out in (run, other))
    assert ours.step == theirs.step
    assert all(torch.equal(value, theirs.model_tensors[name]) for name, value in ours.model_tensors.items())
    assert str(ours.optimizer_state) == str(theirs.optimizer_state)


def scalars(out):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(out / "tensorboard")).Reload()
    return {tag: {event.step: event.value for event in board.Scalars(tag)} for tag in board.Tags()["scalars"]}, board


VARIANTS = {
    "adamw": ["--accumulate", 2],
    "muon": ["--optim.optimizer", "muon", "--accumulate", 2, "--residual.name", "full_attnres"],
}


@pytest.fixture(scope="module", params=VARIANTS)
def runs(request, server, tiny, tmp_path_factory):
    """Folders of an uninterrupted run, and of one that was stopped and killed six times; and how its parts ended."""
    flags = [*tiny, *VARIANTS[request.param]]
    whole, parts = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("parts")
    assert server.run("train", *flags, "--out", whole).status == 0
    ends = [
        server.run("train", *flags, "--out", parts, patch=AT_STEP.format(step=3, action=kill("SIGKILL"))),
        server.run("train", "--resume", "--out", parts, patch=AT_STEP.format(step=5, action=kill("SIGKILL"))),
        server.run("train", "--resume", "--out", parts, patch=AT_STEP.format(step=4, action=kill("SIGTERM"))),
        server.run("train", "--resume", "--out", parts, patch=IN_SAVE.format(call=2, action=kill("SIGKILL"))),
        server.run("train", "--resume", "--out", parts, patch=IN_SAVE.format(call=4, action=kill("SIGKILL"))),
        server.run("train", "--resume", "--out", parts, patch=AT_STEP.format(step=8, action=kill("SIGINT"))),
        server.run("train", "--resume", "--out", parts),
    ]
    return whole, parts, ends


def test_interrupted_run_is_bit_identical_to_an_uninterrupted_one(runs):
    whole, parts, ends = runs
    assert [end.status for end in ends] == [-9, -9, 0, -9, -9, 0, 0]
    assert_same_run(whole, parts)
    steps = [record["step"] for record in metrics(parts) if "loss" in record]
    assert steps == list(range(1, 11))
    assert [record["step"] for record in metrics(parts) if "val_loss" in record] == [0, 4, 8, 10]


def test_signals_save_a_checkpoint_and_say_so(runs):
    for end, step in ((runs[2][2], 4), (runs[2][5], 8)):
        assert f"stopped at step {step}, saved as" in end.err
        assert f"step-{step:08d}; go on with --resume" in end.err
        assert "Traceback" not in end.err


def test_nothing_is_left_over(runs):
    whole, parts, _ = runs
    for out in (whole, parts):
        assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["step-00000009", "step-00000010"]
        assert {path.name for path in out.iterdir()} == {
            "config.json", "metrics.jsonl", "tensorboard", "checkpoints", "tokenizer.json", "tokenizer_config.json",
        }  # fmt: skip


def test_tensorboard_shows_each_step_once(runs):
    whole, parts, _ = runs
    shown, board = scalars(parts)
    for name in ("loss", "lr", "grad_norm", "val_loss"):
        assert len(board.Scalars(name)) == len(shown[name]), f"{name} has a step twice"
        written = {record["step"]: record[name] for record in metrics(whole) if name in record}
        assert shown[name] == pytest.approx(written)


def test_resuming_a_finished_run_changes_nothing(runs, server, tmp_path):
    whole, _, _ = runs
    out = shutil.copytree(whole, tmp_path / "run")
    end = server.run("train", "--resume", "--out", out)
    assert end.status == 0
    assert f"validation loss {metrics(whole)[-1]['val_loss']:.4f} after" in end.out
    assert_same_run(whole, out)


def test_stopping_a_whole_process_group_spares_the_data_workers(server, tiny, tmp_path):
    """A terminal's Ctrl-C and a batch system's SIGTERM go to every process of the group."""
    flags = [*tiny, "--accumulate", 3, "--workers", 1]
    assert server.run("train", *flags, "--out", tmp_path / "whole").status == 0
    for i, name in enumerate(("SIGTERM", "SIGINT")):
        action = f"os.killpg(0, signal.{name}); until_stopped()"
        resume = ["--resume"] if i else flags
        end = server.run("train", *resume, "--out", tmp_path / "a", patch=AT_STEP.format(step=3 + i, action=action))
        assert (end.status, saved(tmp_path / "a")) == (0, f"step-{3 + i:08d}"), end.err
    assert server.run("train", "--resume", "--out", tmp_path / "a", "--workers", 0).status == 0
    assert_same_run(tmp_path / "whole", tmp_path / "a")


def test_a_closed_terminal_stops_a_run_unless_nohup_keeps_it(server, tiny, tmp_path):
    hangup = AT_STEP.format(step=5, action=kill("SIGHUP"))
    heeded = "import signal; signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"  # the tests may run under nohup themselves
    end = server.run("train", *tiny, "--out", tmp_path / "run", patch=heeded + hangup)
    assert end.status == 0 and f"stopped at step 5, saved as {tmp_path}/run/checkpoints/step-00000005" in end.err
    ignored = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
    end = server.run("train", "--resume", "--out", tmp_path / "run", patch=ignored + hangup.replace("== 5", "== 7"))
    assert end.status == 0 and saved(tmp_path / "run") == "step-00000010", end.err


def test_a_second_ctrl_c_ends_at_once(server, tiny, tmp_path):
    twice = AT_STEP.format(step=5, action=kill("SIGINT")) + IN_SAVE.format(
        call=7,
        action=f"{kill('SIGINT')}; time.sleep(60)",  # the first five are those of the checkpoint at step 3
    )
    end = server.run("train", *tiny, "--out", tmp_path / "run", patch=twice)
    assert (end.status, end.err.splitlines()[-1]) == (130, "attnres train: stopped")
    assert "Traceback" not in end.err
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000003"]


def test_two_processes_never_train_in_one_folder(server, tiny, tmp_path):
    out, gate = tmp_path / "run", tmp_path / "gate"
    first = server.start(
        "train", *tiny, "--out", out, patch=AT_STEP.format(step=5, action=f"until_exists({str(gate)!r})")
    )
    first.wait_for(lambda: (out / "checkpoints").exists())
    second = server.start("train", "--resume", "--out", out)
    second.wait_for(lambda: f"waiting for another process that trains in {out}" in second.err())
    gate.touch()
    assert (first.wait().status, second.wait().status) == (0, 0)
    assert [record["step"] for record in metrics(out) if "loss" in record] == list(range(1, 11))
