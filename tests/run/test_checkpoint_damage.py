"""No kill, damage or full disk costs more than the newest checkpoint."""

import errno
import logging
import os
import random
import resource
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from attnres.errors import Failure
from attnres.run import checkpoint, nested
from attnres.run.checkpoint import latest, load, save

from .saved import FILES, assert_number, names, save_number


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


def test_a_later_format_is_refused_by_number(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "FORMAT", 4)
    path = save_number(tmp_path, 1)
    monkeypatch.undo()
    with pytest.raises(Failure, match=r"state\.json has format 4, this version of attnres reads 1 to 3"):
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
            for owner, name in ((os, "fsync"), (os, "rename"), (os, "mkdir"), (nested, "save_file")):
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

    monkeypatch.setattr(nested, "save_file", interrupt)
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
        written = write(scratch, *args)
        if not seen:
            seen.append(names(tmp_path))
            save_number(tmp_path, 8)
            assert scratch.exists()
        return written

    monkeypatch.setattr(checkpoint, "_write", save_by_another_run_meanwhile)
    save_number(tmp_path, 9)
    assert len(seen[0]) == 1 and seen[0][0].startswith(".saving-step-00000009-")
    assert names(tmp_path) == ["step-00000008", "step-00000009"]


def test_a_kill_at_any_moment_leaves_whole_checkpoints_and_nothing_else(tmp_path):
    seed = random.randrange(10**6)
    run = subprocess.run(
        [sys.executable, Path(__file__).with_name("killed_saves.py"), tmp_path, str(seed)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, f"seed {seed}: {run.stderr}"
