"""The command from end to end: two arms that start as one, equal rows, a model to use, and going on after a kill."""

import json
import shutil
import types

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from attnres import hf
from attnres.upgrade import UpgradeConfig, arm
from attnres.upgrade.held_out import losses
from attnres.upgrade.rows import opened, order

from ..lab.test_compare import FORK
from .tiny import tiny_model

SIZES = ["--steps", 8, "--batch-size", 2, "--context", 32, "--validation-tokens", 256]
FLAGS = [*SIZES, "--precision", "float32", "--device", "cpu"]
RATES = {"all": ["--lr", "1e-3"], "lora": ["--lr", "1e-2", "--query-lr", "1e-3"], "residual": ["--query-lr", "1e-2"]}
KILL = "os.killpg(0, signal.SIGKILL)"
KILLED = """
import os, signal
from attnres.upgrade import arm
begin = arm._Watch.on_step_begin
def dying(self, args, state, control, **rest):
    if state.global_step == {step} and self.journal.label.startswith({label!r}):
        {action}
    begin(self, args, state, control, **rest)
arm._Watch.on_step_begin = dying
"""


MIXING = """
from attnres.upgrade import proof
proof.keeps_apart = lambda model: False
"""


def results(out):
    return json.loads((out / "results.json").read_text())


def loss_of(model, out):
    held_out = opened(out / "rows" / "held_out", True)
    return losses(model.eval(), held_out, 2, torch.device("cpu"), torch.float32).mean


@pytest.fixture(scope="module", params=["all", "lora", "residual"])
def upgraded(request, upgrader, model, texts, tmp_path_factory):
    """(what was trained, the folder, how the command ended)."""
    out = tmp_path_factory.mktemp("upgraded") / "out"
    more = ["--seeds", "0,1", "--accumulate", 2, "--warmup-steps", 2] if request.param == "all" else []
    argv = [model, "--data", texts, "--out", out, *FLAGS, "--train", request.param, *RATES[request.param], *more]
    end = upgrader.run("upgrade", *argv, patch=FORK)
    assert end.status == 0, end.err
    return request.param, out, end


def test_both_arms_start_as_one_function_on_equal_rows_and_part(upgraded):
    train, out, _ = upgraded
    found = results(out)
    seeds = [0, 1] if train == "all" else [0]
    assert [(r["residual"], r["seed"]) for r in found["runs"]] == [
        (arm, seed) for seed in seeds for arm in ("plain", "block_attnres")
    ]
    for plain, block in zip(found["runs"][::2], found["runs"][1::2], strict=True):
        assert block["val_curve"]["val_loss"][0] == pytest.approx(plain["val_curve"]["val_loss"][0], abs=2e-6)
        assert block["val_loss"] != plain["val_loss"] and block["val_curve"]["val_loss"][-1] == block["val_loss"]
        assert block["val_curve"]["step"] == [*range(9)] and block["curve"]["step"] == list(range(1, 9))
        if train == "residual":  # nothing of the plain model is trained
            assert (plain["tokens"], plain["trained_parameters"], len(set(plain["val_curve"]["val_loss"]))) == (0, 0, 1)
            assert block["trained_parameters"] == 2 * 7 * 32
        else:
            assert block["curve"]["loss"][0] == pytest.approx(plain["curve"]["loss"][0], abs=2e-6)
            assert block["tokens"] == plain["tokens"] == 8 * 2 * 32 * (2 if train == "all" else 1)
            assert block["trained_parameters"] - plain["trained_parameters"] == 2 * 7 * 32
    assert found["proof"]["packed"] and found["proof"]["conversions"]["block_attnres"]["relative_difference"] < 1e-5


def test_the_folder_holds_a_model_that_has_the_loss_that_is_told(upgraded, model):
    train, out, _ = upgraded
    told = next(r["val_loss"] for r in results(out)["runs"] if r["residual"] == "block_attnres")
    found = AutoModelForCausalLM.from_pretrained(out / "upgraded")
    assert type(found).__name__ == "AttnResLlamaForCausalLM" and found.config.use_cache
    assert found.dtype == torch.float32 and loss_of(found, out) == pytest.approx(told, abs=1e-5)
    assert AutoTokenizer.from_pretrained(out / "upgraded").chat_template
    assert (out / "upgraded" / "README.md").exists()
    before = AutoModelForCausalLM.from_pretrained(model).state_dict()
    moved = {n for n, t in found.state_dict().items() if n not in before or not torch.equal(t, before[n])}
    own = {"model.residual.pseudo_query", "model.residual.key_norm"}
    assert moved == own if train == "residual" else moved > own
    assert not any("lora" in name or "base_layer" in name for name in found.state_dict())
    # Adam moves what is at 0 by about the rate a step, 4.5 rates in 8 steps of a cosine; lr is 10 times as much or 3e-5
    rate = {"all": 1e-3, "lora": 1e-3, "residual": 1e-2}[train]
    assert rate < found.model.residual.pseudo_query.abs().max() < 6 * rate


def test_what_is_told(upgraded):
    train, out, end = upgraded
    found = results(out)
    row = found["summary"][1]
    assert end.out.splitlines()[-1] == found["finding"] and f"{row['difference']:+.4f} +- " in end.out
    assert ("2 seeds" if train == "all" else "one seed") in found["finding"]
    assert "step 8/8" in end.err and f"model: {out}/upgraded" in end.err
    page = (out / "report.html").read_text()
    assert f"{row['difference']:+.4f}".replace("-", "\N{MINUS SIGN}") in page
    assert "Unconverted" in page and "upgraded to Attention Residuals" in page and found["finding"][:60] in page
    assert not list(out.glob("runs/*/checkpoints")) and not list(out.glob("runs/*/model"))


@pytest.mark.parametrize("upgraded", ["all"], indirect=True)
def test_the_plain_arm_is_transformers_own_training(upgraded, model, tmp_path):
    out = upgraded[1]
    rows = opened(out / "rows" / "train", True)

    class InOrder(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield from (rows[int(i)] for i in order(len(rows), 32, 1))

    trainer = Trainer(
        AutoModelForCausalLM.from_pretrained(model),
        TrainingArguments(
            str(tmp_path), max_steps=8, per_device_train_batch_size=2, gradient_accumulation_steps=2,
            learning_rate=1e-3, weight_decay=0.0, lr_scheduler_type="cosine", warmup_steps=2, use_cpu=True,
            report_to="none", save_strategy="no", logging_steps=1, disable_tqdm=True,
        ),
        train_dataset=InOrder(),
    )  # fmt: skip
    trainer.train()
    plain = next(r for r in results(out)["runs"] if (r["residual"], r["seed"]) == ("plain", 1))
    told = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    assert plain["curve"]["loss"] == pytest.approx(told, abs=1e-5)
    assert plain["val_loss"] == pytest.approx(loss_of(trainer.model, out), abs=1e-5)


@pytest.mark.parametrize("steps", [8, 999, 1999])
def test_a_run_of_any_length_tells_some_ten_lines(tmp_path, steps):
    config = UpgradeConfig("m", "d", out=tmp_path, steps=steps)
    told = []
    journal = types.SimpleNamespace(progress=lambda step, text, line: told.append(line), record=lambda **values: None)
    watch = arm._Watch(journal, arm.Arm(config, "plain", 0, True, False), torch.device("cpu"), [], lambda: None)
    args = types.SimpleNamespace(logging_steps=max(1, steps // arm.LINES))
    for step in range(args.logging_steps, steps + 1, args.logging_steps):
        watch.durations.append(1.0)
        watch.on_log(args, types.SimpleNamespace(global_step=step), None, {"loss": 1.0, "grad_norm": 1.0})
    assert min(steps, 9) <= sum(told) <= 10


@pytest.mark.parametrize("upgraded", ["lora", "residual"], indirect=True)
def test_killed_at_any_moment_the_same_command_goes_on(upgrader, model, texts, tmp_path, upgraded):
    """The runs of the fixture again, with one stopped and the whole process group killed on the way."""
    train, whole, _ = upgraded
    out = tmp_path / "out"
    argv = [model, "--data", texts, "--out", out, *FLAGS, "--train", train, *RATES[train], "--checkpoint-every", 2]
    if train == "lora":
        stop = KILLED.format(step=2, label="plain", action="os.kill(os.getpid(), signal.SIGTERM)")
        end = upgrader.run("upgrade", *argv, patch=FORK + stop)
        assert end.status == 1 and "was stopped at step 3; call again to continue" in end.err
        assert (out / "runs" / "plain-seed0" / "checkpoints" / "checkpoint-3" / "whole").exists()
    end = upgrader.run("upgrade", *argv, patch=FORK + KILLED.format(step=5, label="block", action=KILL))
    assert end.status == -9 and "step 3/8" in end.err, end.err
    assert not (out / "results.json").exists() and not (out / "upgraded").exists()
    (half,) = out.glob("runs/block*/checkpoints/checkpoint-4")
    shutil.copytree(half, half.with_name("checkpoint-6"))
    (half.with_name("checkpoint-6") / "whole").unlink()  # as if it had been killed in the middle of the next one
    end = upgrader.run("upgrade", *argv, patch=FORK)
    assert end.status == 0, end.err
    assert "plain, seed 0" not in end.err and "step 4/8" not in end.err and "step 5/8" in end.err
    for run, expected in zip(results(out)["runs"], results(whole)["runs"], strict=True):
        assert run["curve"]["step"] == expected["curve"]["step"]
        assert run["val_curve"]["val_loss"] == pytest.approx(expected["val_curve"]["val_loss"], abs=1e-6)
        assert run["curve"]["loss"] == pytest.approx(expected["curve"]["loss"], abs=1e-6)
    assert (out / "upgraded" / "config.json").exists()
    if train == "residual":  # what is finished is told once more
        again = upgrader.run("upgrade", *argv, patch=FORK)
        assert again.status == 0 and "seed 0" not in again.err and again.out == end.out
    other = upgrader.run("upgrade", *argv, "--steps", 9)
    assert other.status == 2 and f"out holds another upgrade: {out} has steps 8, and this command has 9" in other.err


def test_conversations_are_trained_on(upgrader, model, chats, tmp_path):
    """Several conversions at once, the second with an option behind its name; as if the model did not heed positions:
    then a row is one conversation."""
    argv = [model, "--data", chats, "--out", tmp_path / "out", *FLAGS, "--context", 64, "--steps", 2]
    arms = ["full_attnres", "block_attnres:block_size=2:reads=mlp"]
    end = upgrader.run("upgrade", *argv, "--residual", ",".join(arms), patch=FORK + MIXING)
    assert end.status == 0, end.err
    found = results(tmp_path / "out")
    assert found["corpus"]["conversations"] and 0 < found["corpus"]["val_tokens"] < 40
    assert found["corpus"]["train_rows"] + found["corpus"]["val_rows"] == 40 and not found["proof"]["packed"]
    assert "a row holds one sequence only" in end.err
    assert [row["residual"] for row in found["summary"]] == [
        "plain",
        "full_attnres",
        "block_attnres:block_size=2:reads=mlp",
    ]
    assert hf.load(tmp_path / "out" / "upgraded").config.residual == "full_attnres"


def test_a_gguf_file_is_upgraded(upgrader, tmp_path):
    pytest.importorskip("gguf")
    from ..hf.converted import build
    from ..hf.test_gguf import write

    source = write(build("llama", torch.float32), tmp_path / "tiny.gguf")
    (tmp_path / "text.txt").write_text("".join("ABCDEFGHIJKLMNOPQRSTUVWX"[i * i % 23] for i in range(3000)))
    argv = [source, "--data", tmp_path / "text.txt", "--out", tmp_path / "out", *FLAGS, "--steps", 2]
    end = upgrader.run("upgrade", *argv, patch=FORK)
    assert end.status == 0, end.err
    assert hf.load(tmp_path / "out" / "upgraded").config.model_type == "attnres_llama"
    assert AutoTokenizer.from_pretrained(tmp_path / "out" / "upgraded").decode([3]) == "AB"


def test_tiny_model_is_what_the_folder_holds(model):
    """The fixture's own premise: what is compared above was loaded as it was made."""
    found = AutoModelForCausalLM.from_pretrained(model).state_dict()
    assert all(torch.equal(t, found[n]) for n, t in tiny_model().state_dict().items())
