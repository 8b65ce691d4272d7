"""File systems that can do less, paths with a home folder in them, and what lies where a file should."""

import errno
import fcntl
import os

import pytest

from attnres.data.cache import cached, write_text
from attnres.data.corpus import default_cache_dir
from attnres.errors import Failure, UsageError
from attnres.files import user_path
from attnres.run import checkpoint
from attnres.run import folder as run_folder
from attnres.run.config import TrainConfig
from attnres.run.find import is_run
from attnres.train.journal import Journal

from .run.saved import assert_number, save_number


def refusing(monkeypatch, code, kind):
    """fsync fails with `code` for every folder, or for every file."""
    fsync = os.fsync

    def refused(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}") == (kind == "folder"):
            raise OSError(code, os.strerror(code))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refused)


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_that_does_not_sync_folders_takes_checkpoints_and_caches(tmp_path, monkeypatch, code):
    refusing(monkeypatch, code, "folder")
    for step in (1, 2):
        assert_number(save_number(tmp_path / "checkpoints", step, keep=1), step)
    run_folder.write_config(TrainConfig(out=tmp_path))
    text = cached(
        tmp_path / "entry", lambda p: p.read_text() if p.exists() else None, lambda f: write_text(f, "tokens")
    )
    assert text == "tokens"
    Journal(tmp_path, 1, None, "").sync()


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_disk_that_fails_to_sync_is_still_told(tmp_path, monkeypatch, kind):
    refusing(monkeypatch, errno.EIO, kind)
    with pytest.raises(Failure, match="Input/output error"):
        save_number(tmp_path, 1)


def test_a_file_system_without_locks_trains_with_a_warning(tmp_path, monkeypatch, caplog):
    def no_locks(*args):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with run_folder.held(tmp_path / "run"):
        save_number(tmp_path / "run" / "checkpoints", 1)
    assert f"{tmp_path}/run cannot be locked (No locks available): see that no other process trains" in caplog.text
    text = cached(tmp_path / "a" / "b", lambda p: p.read_text() if p.exists() else None, lambda f: f.write(b"tokens"))
    assert text == "tokens"


def test_a_folder_that_may_be_written_and_not_read(tmp_path, monkeypatch):
    out, opened = tmp_path / "run", os.open

    def unreadable(path, *args, **options):
        if os.path.isdir(path) and os.path.basename(path) == "run":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return opened(path, *args, **options)

    monkeypatch.setattr(os, "open", unreadable)
    with run_folder.held(out):
        run_folder.write_config(TrainConfig(out=out))
        assert_number(save_number(out / "checkpoints", 1), 1)
    assert run_folder.read_config(out).out == out


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "state.json"])
def test_a_fifo_in_the_place_of_a_file_is_refused_at_once(tmp_path, name):
    config = TrainConfig(out=tmp_path)
    run_folder.write_config(config)
    folder = save_number(tmp_path / "checkpoints", 1)
    file = folder / name if name == "state.json" else tmp_path / name
    file.unlink(missing_ok=True)
    os.mkfifo(file)
    uses = {
        "config.json": [lambda: run_folder.read_config(tmp_path), lambda: is_run(tmp_path)],
        "metrics.jsonl": [lambda: Journal(tmp_path, 1, 0, "")],
        "state.json": [lambda: checkpoint.load(folder)],
    }
    for use in uses[name]:
        with pytest.raises(Failure, match="not a regular file"):
            use()


def test_one_rule_for_all_paths(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = TrainConfig(out="~/run", cache_dir="~/cache")
    assert (config.out, config.cache_dir) == (tmp_path / "run", tmp_path / "cache")
    monkeypatch.delenv("ATTNRES_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "~/x")
    assert default_cache_dir() == tmp_path / "x" / "attnres"
    monkeypatch.setenv("ATTNRES_CACHE", "~/y")
    assert default_cache_dir() == tmp_path / "y"
    with pytest.raises(UsageError, match="~nobody-of-that-name/x begins with a home folder that is not known here"):
        user_path("~nobody-of-that-name/x")


def test_a_process_without_a_home_folder_says_what_to_set(monkeypatch):
    for name in ("HOME", "ATTNRES_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])
    with pytest.raises(UsageError, match="no home folder is known here to cache tokens in; set ATTNRES_CACHE"):
        default_cache_dir()
    with pytest.raises(UsageError, match="write the path in full"):
        user_path("~/x")
