"""Checkpoints come back bit for bit, and no kill, damage or full disk costs more than the newest one."""

import errno
import json
import logging
import math
import os
import pickle
import random
import resource
import shutil
import stat
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from attnres.errors import Failure, UsageError
from attnres.train import checkpoint
from attnres.train.checkpoint import check_compatible, latest, load, rng_state, save, set_rng_state
from attnres.train.optim import OptimConfig, build_optimizer

FILES = ("model.safetensors", "optimizer.safetensors", "state.json")


def save_number(root: Path, step: int, keep: int = 10) -> Path:
    """A checkpoint in which every tensor and the state hold the step."""
    tensor = torch.full((64,), float(step))
    return save(root, step, {"w": tensor}, {"adamw": {"w": {"exp_avg": tensor.clone()}}}, {"number": step}, keep)


def assert_number(path: Path, step: int) -> None:
    model, optimizer, state, loaded_step = load(path)
    assert torch.equal(model["w"], torch.full((64,), float(step)))
    assert torch.equal(optimizer["adamw"]["w"]["exp_avg"], model["w"])
    assert (state, loaded_step) == ({"number": step}, step)


def names(root: Path) -> list[str]:
    return sorted(os.listdir(root))


def assert_same(left, right) -> None:
    """Equal in value, type, dtype and every bit (NaN included)."""
    assert type(left) is type(right)
    if isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype and left.shape == right.shape
        assert left.contiguous().flatten().view(torch.uint8).equal(right.contiguous().flatten().view(torch.uint8))
    elif isinstance(left, dict):
        assert list(left) == list(right)
        for (key, value), (other_key, other) in zip(left.items(), right.items(), strict=True):
            assert type(key) is type(other_key)
            assert_same(value, other)
    elif isinstance(left, list | tuple):
        assert len(left) == len(right)
        for value, other in zip(left, right, strict=True):
            assert_same(value, other)
    else:
        assert repr(left) == repr(right)


def test_everything_comes_back_bit_for_bit(tmp_path):
    odd_bits = torch.tensor([math.nan, -0.0, math.inf, 1e-45])
    model = {
        "float32": odd_bits,
        "float64": torch.randn(3, 2, dtype=torch.float64),
        "bfloat16": torch.randn(5).bfloat16(),
        "half": torch.randn(2).half(),
        "int64": torch.tensor([2**62 + 1]),
        "bool": torch.tensor([True, False]),
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0, 4),
        "also.empty": torch.zeros(0, 4),
        "transposed": torch.randn(3, 2).t(),
    }
    nested = {
        "step": torch.tensor(7.0),
        "groups": [{"betas": (0.9, 0.95), "fused": True, "foreach": None, "lr": 0.1 + 0.2, "params": [0, 1]}],
        "empty": [{}, [], ()],
        0: torch.arange(3),
        "0": torch.arange(4),
        "a/b": {"c": torch.ones(1)},
        "a": {"b/c": torch.zeros(1)},
        "__tensor__": "only a key",
        "limits": (math.inf, math.nan, -0.0, 2**70, "ü\n"),
    }
    path = save(tmp_path, 3, model, nested, {"like": {1: nested["groups"]}}, keep=1)
    loaded = load(path)
    assert_same(loaded.model_tensors, model)
    assert_same(loaded.optimizer_state, nested)
    assert_same(loaded.state, {"like": {1: nested["groups"]}})


def test_tied_tensors_are_stored_once_and_stay_tied(tmp_path):
    table = torch.randn(10, 4)
    model = {"embed": table, "head": table, "part": table[2:5], "flat": table.view(-1), "alike": table.clone()}
    path = save(tmp_path, 0, model, {"a": table, "b": table}, {}, keep=1)
    loaded = load(path)
    assert_same({name: loaded.model_tensors[name] for name in model}, model)
    assert loaded.model_tensors["head"] is loaded.model_tensors["embed"]
    assert loaded.optimizer_state["a"] is loaded.optimizer_state["b"]
    pointers = {tensor.data_ptr() for tensor in loaded.model_tensors.values()}
    assert len(pointers) == 4, "tensors that were views of one memory must not be tied unless they are the same tensor"
    assert "head" not in load_file(path / "model.safetensors")


def test_a_value_that_cannot_be_stored_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"^state/where/1 is a PosixPath, which a checkpoint cannot hold"):
        save(tmp_path, 0, {}, {}, {"where": [0, Path("x")]}, keep=1)
    assert names(tmp_path) == []


@pytest.mark.parametrize(("step", "keep"), [(-1, 1), (0, 0)])
def test_step_and_keep_are_checked(tmp_path, step, keep):
    with pytest.raises(UsageError, match="step must be >= 0 and keep at least 1"):
        save_number(tmp_path, step, keep)


def test_files_can_be_read_by_whom_the_umask_allows(tmp_path):
    before = os.umask(0o027)
    try:
        path = save_number(tmp_path, 1)
    finally:
        os.umask(before)
    assert {stat.S_IMODE((path / name).stat().st_mode) for name in FILES} == {0o640}
    assert stat.S_IMODE(path.stat().st_mode) == 0o750


def test_nothing_is_unpickled(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("unpickled")

    path = save_number(tmp_path, 1)
    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(module, name, refuse)
    assert_number(path, 1)


def test_what_was_loaded_does_not_depend_on_the_files_any_more(tmp_path):
    path = save_number(tmp_path, 3)
    loaded = load(path)
    for name in FILES:
        with (path / name).open("r+b") as file:
            file.write(bytes((path / name).stat().st_size))
    assert loaded.model_tensors["w"].eq(3).all() and loaded.optimizer_state["adamw"]["w"]["exp_avg"].eq(3).all()


def test_latest_is_the_highest_step_and_strangers_are_ignored(tmp_path):
    assert latest(tmp_path / "absent") is None
    assert latest(tmp_path) is None
    for step in (9, 100, 20):
        save_number(tmp_path, step)
    for stranger in ("step-1", "step-00000999x", "other", ".saving-step-00000999-0"):
        (tmp_path / stranger).mkdir()
    (tmp_path / "step-00000500").write_text("a file")
    assert latest(tmp_path) == tmp_path / "step-00000100"
    assert_number(tmp_path / "step-00000100", 100)


def test_the_last_ones_are_kept(tmp_path):
    for step in range(1, 6):
        save_number(tmp_path, step, keep=3)
    assert names(tmp_path) == ["step-00000003", "step-00000004", "step-00000005"]
    save_number(tmp_path, 6, keep=1)
    assert names(tmp_path) == ["step-00000006"]


def test_one_that_was_just_written_is_never_removed_as_outdated(tmp_path):
    save_number(tmp_path, 10)
    save_number(tmp_path, 2)
    path = save_number(tmp_path, 3, keep=1)
    assert names(tmp_path) == ["step-00000003", "step-00000010"]
    assert_number(path, 3)


def test_the_same_step_is_replaced(tmp_path):
    save_number(tmp_path, 4)
    path = save(tmp_path, 4, {"w": torch.zeros(1)}, {}, {"second": True}, keep=1)
    assert load(path).state == {"second": True}
    assert names(tmp_path) == ["step-00000004"]


def damages(path: Path):
    """(file, how, action) for many ways to damage a checkpoint."""
    for name in FILES:
        size = (path / name).stat().st_size
        for length in sorted({0, 1, 7, 8, 9, size // 3, size // 2, size - 9, size - 1}):
            yield name, f"cut to {length}", lambda file, n=length: os.truncate(file, n)
        yield name, "gone", lambda file: file.unlink()
        yield name, "longer", lambda file: file.write_bytes(file.read_bytes() + b" x")
        for place in (0, 10, size // 2, size - 2):
            yield name, f"flipped bit at {place}", lambda file, n=place: flip(file, n)


def flip(file: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


def test_damage_anywhere_is_found_and_the_one_before_is_used(tmp_path, caplog):
    older = save_number(tmp_path / "run", 1)
    newer = save_number(tmp_path / "run", 2)
    kept = tmp_path / "kept"
    shutil.copytree(newer, kept)
    for name, how, damage in list(damages(newer)):
        damage(newer / name)
        caplog.clear()
        with caplog.at_level(logging.WARNING, "attnres"):
            assert latest(tmp_path / "run") == older, f"{name} {how}"
        assert [record for record in caplog.records if str(newer / name) in record.getMessage()], f"{name} {how}"
        with pytest.raises(Failure) as caught:
            load(newer)
        assert str(newer / name) in str(caught.value) and f"use {older} instead" in str(caught.value), f"{name} {how}"
        shutil.rmtree(newer)
        shutil.copytree(kept, newer)
    assert latest(tmp_path / "run") == newer


def test_only_damaged_ones_left(tmp_path):
    path = save_number(tmp_path, 1)
    os.truncate(path / "model.safetensors", 50)
    assert latest(tmp_path) is None
    with pytest.raises(Failure, match=r"model\.safetensors is damaged: 50 of \d+ bytes; no whole checkpoint is left"):
        load(path)


def test_a_folder_that_is_no_checkpoint_is_a_usage_error(tmp_path):
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(UsageError, match="is not a checkpoint; give a folder such as"):
            load(path)


def test_a_later_format_is_refused_by_number(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "FORMAT", 2)
    path = save_number(tmp_path, 1)
    monkeypatch.undo()
    with pytest.raises(Failure, match=r"state\.json has format 2, this version of attnres reads 1"):
        load(path)


def test_a_damaged_checkpoint_of_the_same_step_is_replaced(tmp_path):
    path = save_number(tmp_path, 5)
    (path / "state.json").unlink()
    save_number(tmp_path, 5)
    assert_number(path, 5)
    assert names(tmp_path) == ["step-00000005"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES])
@pytest.mark.parametrize("again", [False, True], ids=["new step", "same step"])
def test_a_disk_error_at_any_call_leaves_the_earlier_checkpoints(tmp_path, monkeypatch, code, again):
    root = tmp_path / "run"
    for step in (1, 2):
        save_number(root, step)
    target = 2 if again else 3
    for failing_call in range(100):
        calls = iter(range(1000))

        def guard(call, calls=calls, failing_call=failing_call):
            def guarded(*args, **kwargs):
                if next(calls) == failing_call:
                    raise OSError(code, os.strerror(code))
                return call(*args, **kwargs)

            return guarded

        with monkeypatch.context() as patched:
            for owner, name in ((os, "fsync"), (os, "rename"), (os, "mkdir"), (checkpoint, "save_file")):
                patched.setattr(owner, name, guard(getattr(owner, name)))
            try:
                save(root, target, {"w": torch.zeros(1)}, {}, {"unfinished": True}, keep=10)
            except Failure as failure:
                assert os.strerror(code) in str(failure) and str(root) in str(failure)
            finished = next(calls) <= failing_call
        if finished:
            break
        assert_number(root / "step-00000001", 1)
        newest = latest(root)
        assert newest is not None
        if load(newest).state != {"unfinished": True}:  # unless only the sync after the last rename failed
            assert_number(newest, 2)
        assert not [name for name in names(root) if name.startswith(".saving")]
        shutil.rmtree(root)
        for step in (1, 2):
            save_number(root, step)
    assert failing_call >= 9


@contextmanager
def largest_file(size: int):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("large", ["model", "optimizer", "state"])
def test_a_file_that_the_system_refuses_is_a_failure(tmp_path, large):
    save_number(tmp_path, 1)
    tensors = {"w": torch.zeros(100_000)}
    model, optimizer = (tensors if large == name else {} for name in ("model", "optimizer"))
    state = {"text": "x" * 200_000 if large == "state" else ""}
    with largest_file(100_000), pytest.raises(Failure, match=r"^cannot save step 2 under .*File too large.*MB free"):
        save(tmp_path, 2, model, optimizer, state, keep=1)
    assert names(tmp_path) == ["step-00000001"]
    assert_number(tmp_path / "step-00000001", 1)


def test_a_root_that_cannot_be_made_is_a_failure(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(Failure, match=r"^cannot save step 1 under .*file/run: Not a directory; make it writable"):
        save_number(tmp_path / "file" / "run", 1)


def test_all_is_on_the_disk_before_a_name_says_so_and_before_anything_is_deleted(tmp_path, monkeypatch):
    save_number(tmp_path, 1)
    events = []
    fsync, rename, rmtree = os.fsync, os.rename, shutil.rmtree

    def record(kind, path):
        name = Path(path).name
        events.append((kind, ".saving" if name.startswith(".saving") else name))

    monkeypatch.setattr(os, "fsync", lambda fd: (record("sync", os.readlink(f"/proc/self/fd/{fd}")), fsync(fd)))
    monkeypatch.setattr(os, "rename", lambda old, new: (record("rename", old), rename(old, new)))
    monkeypatch.setattr(
        checkpoint.shutil, "rmtree", lambda path, **options: (record("delete", path), rmtree(path, **options))
    )
    save_number(tmp_path, 2, keep=1)
    published = events.index(("rename", ".saving"))
    assert {("sync", name) for name in (*FILES, ".saving")} <= set(events[:published])
    assert events.index(("sync", "state.json")) < events.index(("sync", ".saving"))
    outdated = events.index(("rename", "step-00000001"))
    assert ("sync", tmp_path.name) in events[published:outdated]
    deleted = next(i for i, (kind, name) in enumerate(events) if kind == "delete" and name.startswith(".removing"))
    assert ("sync", tmp_path.name) in events[outdated:deleted]


def test_an_interrupted_save_cleans_up(tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save_file", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_number(tmp_path, 1)
    assert names(tmp_path) == []


def test_leftovers_of_dead_runs_are_swept_and_those_of_living_ones_are_not(tmp_path, monkeypatch):
    for leftover in (".saving-step-00000007-ab", ".removing-step-00000001-cd"):
        (tmp_path / leftover).mkdir()
        (tmp_path / leftover / "model.safetensors").write_bytes(b"half")
    seen = []
    write = checkpoint._write

    def save_by_another_run_meanwhile(scratch, *args):
        write(scratch, *args)
        if not seen:
            seen.append(names(tmp_path))
            save_number(tmp_path, 8)
            assert scratch.exists()

    monkeypatch.setattr(checkpoint, "_write", save_by_another_run_meanwhile)
    save_number(tmp_path, 9)
    assert len(seen[0]) == 1 and seen[0][0].startswith(".saving-step-00000009-")
    assert names(tmp_path) == ["step-00000008", "step-00000009"]


KILLED = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from attnres.train import checkpoint
from attnres.train.checkpoint import latest, load, save

def write(root, step, keep):
    tensor = torch.full((64,), float(step))
    save(root, step, {"w": tensor}, {"w": {"exp_avg": tensor.clone()}}, {"number": step}, keep)

def newest(root):
    for path in root.glob("step-*"):
        model, optimizer, state, step = load(path)
        assert state == {"number": step} and model["w"].eq(step).all() and optimizer["w"]["exp_avg"].eq(step).all()
    path = latest(root)
    return None if path is None else load(path).step

def child(work):
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(0)
    return pid

def kill_at_call(number):
    # the process ends, without any cleaning up, in front of its n-th call that changes the disk
    calls = iter(range(10**6))
    def guard(function):
        def guarded(*args, **kwargs):
            if next(calls) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)
        return guarded
    for owner, name in ((os, "fsync"), (os, "rename"), (os, "mkdir"), (os, "unlink"), (os, "rmdir"),
                        (checkpoint, "save_file"), (Path, "write_text")):
        setattr(owner, name, guard(getattr(owner, name)))

def kill_at_every_call(root, same_step):
    write(root, 1, keep=1)
    for number in range(200):
        before = newest(root)
        def once():
            kill_at_call(number)
            write(root, before if same_step else before + 1, keep=1)
        _, status = os.waitpid(child(once), 0)
        after = newest(root)
        assert after is not None and before <= after <= before + (not same_step), (number, before, after)
        if not os.WIFSIGNALED(status):
            break
    assert 10 < number < 199, number
    write(root, before + 2, keep=1)
    assert len(os.listdir(root)) == 1, os.listdir(root)

def kill_at_random(root, kills):
    start = time.monotonic()
    for step in range(3):
        write(root.with_name("timing"), step, keep=1)
    seconds_per_save = (time.monotonic() - start) / 3
    reached = None
    def forever():
        step = 1 + (reached or 0)
        while True:
            write(root, step, keep=2)
            step += 1
    for _ in range(kills):
        pid = child(forever)
        time.sleep(random.uniform(0.0, 4 * seconds_per_save))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        step = newest(root)
        assert step is not None or reached is None, f"after step {reached} nothing is left"
        assert step is None or reached is None or step >= reached, f"fell back from {reached} to {step}"
        assert not root.exists() or len(os.listdir(root)) <= 5, "leftovers pile up"
        reached = step
    assert reached

root = Path(sys.argv[1])
random.seed(int(sys.argv[2]))
kill_at_every_call(root / "new step", same_step=False)
kill_at_every_call(root / "same step", same_step=True)
kill_at_random(root / "random", kills=40)
"""


def test_a_kill_at_any_moment_leaves_whole_checkpoints_and_nothing_else(tmp_path):
    seed = random.randrange(10**6)
    run = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), str(seed)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, f"seed {seed}: {run.stderr}"


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.hidden = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.dropout = nn.Dropout(0.2)
        self.lm_head = nn.Linear(8, 16, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.lm_head(self.norm(self.dropout(self.hidden(self.embed(tokens)).relu())))


def train(model: nn.Module, optimizer, steps: range) -> None:
    for step in steps:
        tokens = torch.randint(16, (32,)) if random.random() < 0.5 else torch.from_numpy(np.random.randint(16, size=32))
        optimizer.set_learning_rate(step, 12)
        nn.functional.cross_entropy(model(tokens), tokens.roll(-1)).backward()
        optimizer.clip_gradients()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_resumed_run_is_bit_identical_to_an_uninterrupted_one(tmp_path, name):
    config = OptimConfig(optimizer=name, lr=0.05, warmup_steps=2)
    torch.manual_seed(0)
    random.seed(1)
    np.random.seed(2)
    model = Tiny()
    optimizer = build_optimizer(model, config)
    train(model, optimizer, range(6))
    path = save(tmp_path, 6, model.state_dict(), optimizer.state_dict(), {"rng": rng_state()}, keep=1)
    train(model, optimizer, range(6, 12))
    generators = rng_state()

    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(99)
    resumed = Tiny()
    loaded = load(path)
    resumed.load_state_dict(loaded.model_tensors)
    continued = build_optimizer(resumed, config)
    continued.load_state_dict(loaded.optimizer_state)
    set_rng_state(loaded.state["rng"])
    train(resumed, continued, range(loaded.step, 12))

    assert_same(dict(resumed.state_dict()), dict(model.state_dict()))
    assert_same(continued.state_dict(), optimizer.state_dict())
    assert_same(rng_state(), generators)
    assert resumed.lm_head.weight is resumed.embed.weight


def test_torchs_own_state_dict_of_an_optimizer_comes_back(tmp_path):
    layer = nn.Linear(3, 3)
    optimizer = torch.optim.AdamW(layer.parameters(), amsgrad=True)
    layer(torch.randn(2, 3)).sum().backward()
    optimizer.step()
    loaded = load(save(tmp_path, 1, {}, optimizer.state_dict(), {}, keep=1)).optimizer_state
    assert_same(loaded, optimizer.state_dict())
    assert loaded["state"][0]["step"].shape == ()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_checkpoint_moves_between_devices_and_keeps_the_device_generator(tmp_path):
    model = nn.Linear(4, 4).cuda()
    optimizer = build_optimizer(model, OptimConfig(optimizer="muon", warmup_steps=0))
    model(torch.ones(2, 4, device="cuda")).square().sum().backward()
    optimizer.step()
    path = save(tmp_path, 1, model.state_dict(), optimizer.state_dict(), {"rng": rng_state()}, keep=1)
    expected = torch.rand(3, device="cuda")
    for device in ("cpu", "cuda"):
        loaded = load(path, device)
        assert {tensor.device.type for tensor in loaded.model_tensors.values()} == {device}
        resumed = nn.Linear(4, 4).to(device)
        resumed.load_state_dict(loaded.model_tensors)
        continued = build_optimizer(resumed, OptimConfig(optimizer="muon", warmup_steps=0))
        continued.load_state_dict(loaded.optimizer_state)
        resumed(torch.ones(2, 4, device=device)).square().sum().backward()
        continued.step()
        set_rng_state(loaded.state["rng"])
        assert torch.equal(torch.rand(3, device="cuda"), expected)


def test_equal_configurations_are_compatible():
    check_compatible(
        json.loads(json.dumps({"model": {"dims": (1, 2), "options": {}}, "lr": 1e-3})),
        {"model": {"dims": (1, 2), "options": {}}, "lr": 1e-3},
    )


def test_differing_fields_are_named_with_both_values():
    saved = {"model": {"hidden_size": 256, "residual": "prenorm", "options": {}, "gone": None}, "lr": 1e-3}
    now = {"model": {"hidden_size": 512, "residual": "prenorm", "options": {"num_blocks": 4}}, "lr": 1e-3}
    with pytest.raises(UsageError) as caught:
        check_compatible(saved, now)
    message = str(caught.value)
    for difference in (
        "model.hidden_size (256 in the checkpoint, 512 now)",
        "model.options.num_blocks (absent in the checkpoint, 4 now)",
        "model.gone (null in the checkpoint, absent now)",
    ):
        assert difference in message
    assert "residual" not in message and "lr" not in message
