"""Checkpoints that many processes write together: any split reads them, whole or absent whatever happens."""

import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from attnres.errors import Failure
from attnres.run import checkpoint
from attnres.run.folder import newest_checkpoint, read_config
from attnres.run.opening import open as open_model

from . import runs
from .versions import V_SHAPED

PP = {"pp": 4, "microbatches": 4, "schedule": "Interleaved1F1B", "virtual_stages": 2}
TP_PP = {"tp": 2, "pp": 2, "microbatches": 2}
SHARD_PP = {"shard": 2, "pp": 2, "microbatches": 2, "schedule": V_SHAPED, "virtual_stages": 2}
EP = {"shard": 4, "ep": 2}
EP_PP = {"shard": 2, "pp": 2, "ep": 2, "microbatches": 2}
ALONE: dict = {}
TIED_FULL = {"residual": "full_attnres", "residual_options": {}, "tie_word_embeddings": True}
CHAINS = {
    "adamw": ({}, {}, [PP, TP_PP, ALONE, SHARD_PP, {"dp": 4}], 1e-5, 1e-5),
    "adamw, tied": (TIED_FULL, {}, [SHARD_PP, PP, {"tp": 2, "shard": 2}, ALONE, PP], 1e-5, 1e-5),
    "adamw, experts": (runs.EXPERTS, {}, [EP, {**EP, "ep": 4}, ALONE, EP_PP, PP], 1e-5, 3e-5),
    "muon": ({}, {"optimizer": "muon"}, [PP, TP_PP, ALONE, {"shard": 4}], 1e-3, 2e-2),  # it works in bfloat16
}


def assert_close(ours, theirs, tolerance, where):
    """Nested alike, under the same names, and every tensor equal to a fraction of its L2 norm."""
    if isinstance(theirs, torch.Tensor):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype), where
        assert (ours - theirs).norm() <= tolerance * theirs.norm() + 1e-9, where
        return
    assert ours.keys() == theirs.keys(), where
    for name, value in theirs.items():
        assert_close(ours[name], value, tolerance, f"{where}/{name}")


@pytest.mark.parametrize("chain", CHAINS)
def test_a_run_goes_on_under_any_other_split(world, corpus_file, tmp_path, chain):
    model, optim, splits, curve_tolerance, tolerance = CHAINS[chain]
    run = {"model": model, "optim": {"eps": 1e-6, **optim}, "steps": len(splits), "checkpoint_every": 1, "keep": 9}
    runs.run(runs.settings(corpus_file, tmp_path / "one", **run))
    for step, split in enumerate(splits, 1):
        config = runs.settings(corpus_file, tmp_path / "many", split, **run)
        arguments = (config, step > 1, (config.parallel.world_size - 1, step))  # a SIGTERM to the last process
        ends = world(4).run(runs.run, *arguments) if split else [runs.run(*arguments)]
        assert {end[:2] for end in ends} == {(step == len(splits), step)}
    ours, theirs = runs.curve(tmp_path / "many"), runs.curve(tmp_path / "one")
    for name, values in theirs.items():
        assert ours[name] == pytest.approx(values, rel=curve_tolerance), name
    for step in range(1, len(splits) + 1):
        many, one = (checkpoint.load(tmp_path / out / f"checkpoints/step-{step:08d}") for out in ("many", "one"))
        assert_close(many.model_tensors, one.model_tensors, tolerance, f"step {step}")
        assert_close(many.optimizer_state, one.optimizer_state, tolerance, f"step {step}")


def test_experts_and_their_balance_are_restored_bit_for_bit_on_any_number_of_processes(world, corpus_file, tmp_path):
    out, run = tmp_path / "run", {"model": runs.EXPERTS, "optim": {"optimizer": "muon"}, "steps": 2}
    balance = world(4).run(runs.trained_biases, runs.settings(corpus_file, out, EP, **run))
    assert len(balance[0]) == 3 and all(any(bias) for bias in balance[0].values())
    assert balance == balance[:1] * 4
    path = newest_checkpoint(out)
    for split in ({**EP, "ep": 4}, {"shard": 2, "tp": 2, "ep": 2}, {"dp": 4}):
        config = runs.settings(corpus_file, out, split, **run)
        assert world(4).run(runs.restored, config, path) == [([], balance[0])] * 4, split
    checkpoint.export(path, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert {name: stored[name].tolist() for name in balance[0]} == balance[0]
    decoder = open_model(out, device="cpu").model
    assert {name: b.tolist() for name, b in decoder.named_buffers() if name in balance[0]} == balance[0]


@pytest.fixture(scope="module")
def three_steps(world, corpus_file, tmp_path_factory):
    """A run of three steps on four processes with its last two checkpoints."""
    out = tmp_path_factory.mktemp("sharded") / "run"
    world(4).run(runs.run, runs.settings(corpus_file, out, TP_PP, checkpoint_every=1, keep=2))
    return out


@pytest.fixture
def run(three_steps, tmp_path):
    """A copy of it."""
    return Path(shutil.copytree(three_steps, tmp_path / "run"))


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_checkpoint_is_the_parts_of_all_processes_and_no_more_are_kept_than_asked_for(three_steps):
    assert names(three_steps / "checkpoints") == ["step-00000002", "step-00000003"]
    newest = newest_checkpoint(three_steps)
    parts = (f"{kind}-{rank}.safetensors" for kind in ("model", "optimizer") for rank in range(4))
    assert names(newest) == [*parts, "state.json"]


def edit(file):
    file.write_text(file.read_text().replace('"step": 3', '"step": 4'))


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGES = {
    "a truncated part": ("model-1.safetensors", lambda file: os.truncate(file, file.stat().st_size - 1)),
    "a part less": ("optimizer-3.safetensors", Path.unlink),
    "a bit of a part": ("model-2.safetensors", flip),
    "an edited state.json": ("state.json", edit),
    "no state.json": ("state.json", Path.unlink),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(run, damage, caplog):
    older, newest = (run / "checkpoints" / f"step-{step:08d}" for step in (2, 3))
    name, spoil = DAMAGES[damage]
    spoil(newest / name)
    assert newest_checkpoint(run) == older
    assert str(newest / name) in caplog.text and "trying the checkpoint before it" in caplog.text
    with pytest.raises(Failure, match=rf"{newest / name} .*; use {older} instead"):
        checkpoint.load(newest)


def test_a_part_whose_contents_are_no_tensors_is_a_failure(run):
    newest = newest_checkpoint(run)
    for part in newest.glob("model-*.safetensors"):
        part.write_bytes(bytes(part.stat().st_size))
    with pytest.raises(Failure, match=rf"^{newest}/model-\d\.safetensors is damaged: .*; use .*"):
        checkpoint.load(newest)


def test_processes_go_on_from_the_checkpoint_before_a_damaged_one(world, corpus_file, run):
    whole = runs.curve(run)
    config = runs.settings(corpus_file, run, {"pp": 4, "microbatches": 4}, checkpoint_every=1, keep=1)
    os.truncate(run / "checkpoints/step-00000003/model-2.safetensors", 100)
    assert world(4).run(runs.run, config, True)[0][:2] == (True, 3)
    assert runs.curve(run) == {name: pytest.approx(values, rel=2e-6) for name, values in whole.items()}
    assert names(run / "checkpoints") == ["step-00000003"]
    assert checkpoint.load(newest_checkpoint(run)).step == 3
    (run / "checkpoints/step-00000003/model-0.safetensors").unlink()
    message = said_by_all(world(4).run(runs.failing, config, True), "Failure")
    assert message.startswith(f"every checkpoint in {run / 'checkpoints'} is damaged; start a new run")


@pytest.mark.parametrize("victim", ["the last process, in its part", "the first process, before state.json"])
def test_a_process_killed_while_saving_leaves_the_checkpoint_before_it(world, corpus_file, tmp_path, victim):
    split = {"pp": 2, "shard": 2, "microbatches": 2}
    config = runs.settings(corpus_file, tmp_path / "run", split, checkpoint_every=1, keep=1)
    with pytest.raises(AssertionError, match="the process died"):
        world(4).run(runs.killed_in_save, config, 3 if "part" in victim else 0, 2)
    folder = config.out / "checkpoints"
    assert [name for name in names(folder) if not name.startswith(".saving-step-00000002")] == ["step-00000001"]
    assert checkpoint.load(newest_checkpoint(config.out)).step == 1
    world(4).run(runs.run, config, True)
    assert names(folder) == ["step-00000003"]
    assert runs.curve(config.out)["step"] == [0, 1, 2, 2, 3, 3]


def said_by_all(ends, kind):
    """The one sentence that all processes failed with."""
    ((name, message),) = set(ends)
    assert name == kind
    return message


@pytest.mark.parametrize("rank", [0, 2])
def test_a_full_disk_of_one_process_is_told_by_all_and_the_checkpoint_before_it_stays(world, corpus_file, run, rank):
    config = runs.settings(corpus_file, run, TP_PP, checkpoint_every=1, keep=2)
    shutil.rmtree(run / "checkpoints/step-00000003")
    message = said_by_all(world(4).run(runs.failing, config, True, rank), "Failure")
    assert re.match(rf"cannot save step 3 under {run / 'checkpoints'}: .*File too large.*MB free", message)
    assert names(run / "checkpoints") == ["step-00000002"]
    assert [end[1] for end in world(4).run(runs.run, config, True)] == [3] * 4


def test_a_folder_that_cannot_be_used_is_told_by_all(world, corpus_file, run, tmp_path):
    (tmp_path / "file").write_text("")
    ends = world(4).run(runs.failing, runs.settings(corpus_file, tmp_path / "file/run", TP_PP))
    assert said_by_all(ends, "Failure").startswith(f"cannot write {tmp_path / 'file/run'}: ")
    ends = world(4).run(runs.failing, runs.settings(corpus_file, run, TP_PP))
    assert said_by_all(ends, "UsageError").startswith(f"out holds a run already: {run}; pass --resume")
    ends = world(4).run(runs.failing, runs.settings(corpus_file, tmp_path / "none", TP_PP), True)
    assert said_by_all(ends, "UsageError").startswith("nothing to resume in ")
    config = runs.settings(corpus_file, run, TP_PP, {"num_hidden_layers": 3})
    message = said_by_all(world(4).run(runs.failing, config, True), "UsageError")
    assert "model.num_hidden_layers (4 in the checkpoint, 3 now)" in message


def test_a_folder_that_one_process_does_not_see_is_refused(world, corpus_file, tmp_path):
    config = runs.settings(corpus_file, Path("run"), TP_PP)
    message = said_by_all(world(4).run(runs.elsewhere, config, tmp_path, 3), "UsageError")
    assert message.startswith("out must be a folder that all processes see: 1 of 4 do not find run/config.json")


def test_generate_eval_and_transformers_read_a_run_of_many_processes(run, corpus_file, capsys):
    from attnres.commands import eval as evaluate
    from attnres.commands import generate
    from attnres.hf import AttnResForCausalLM

    newest = newest_checkpoint(run)
    before = sorted(run.rglob("*"))
    decoder, config = open_model(run, device="cpu").model, read_config(run)
    tokens = torch.arange(48).view(3, 16)
    expected = decoder(tokens)
    assert generate.run([str(run), "--prompt", "the", "--tokens", "5", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.startswith("the")
    assert evaluate.run([str(run), "--data", str(corpus_file), "--context", "16", "--device", "cpu"]) == 0
    model = AttnResForCausalLM.from_run(newest, dtype="float32")
    torch.testing.assert_close(model(tokens).logits, expected)
    assert sorted(run.rglob("*")) == before  # which may belong to somebody else
    assert runs.run(config.__class__.from_dict({**config.to_dict(), "parallel": {}}), True) == (
        True, 3, pytest.approx(runs.curve(run)["val_loss"][-1], rel=2e-6),
    )  # fmt: skip
    assert checkpoint.load(newest).step == 3


def test_a_model_that_cannot_be_put_together_on_disk_is_a_failure(run, tmp_path):
    newest = newest_checkpoint(run)
    with (
        runs.largest_file(10_000),
        pytest.raises(Failure, match=rf"^cannot write {tmp_path}/model.safetensors, .*set TMPDIR to a folder"),
    ):
        checkpoint.export(newest, tmp_path)
