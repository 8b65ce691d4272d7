"""Calls in child processes: one that overruns or crashes is ended with all that it started, and the others go on."""

import os
import time
from pathlib import Path

import pytest


def test_a_worker_survives_its_calls(benchmarks: Path, tmp_path: Path) -> None:
    import processes

    with processes.Worker() as worker:
        assert worker.call(len, "ab", seconds=60) == 2
        with pytest.raises(processes.Failed, match="ValueError: invalid literal"):
            worker.call(int, "x", seconds=60)
        with pytest.raises(processes.Ended, match="exit code 3"):
            worker.call(os._exit, 3, seconds=60)
        assert worker.call(len, "abc", seconds=60) == 3  # in a new process
        file = tmp_path / "pid"
        with pytest.raises(processes.Ended, match="not ready within 2 s"):
            worker.call(os.system, f"sleep 300 & echo $! >{file}; wait", seconds=2)
        assert worker.too_long(time.sleep, 60, seconds=0.5) == "not ready within 0 s"
        assert worker.too_long(int, "x", seconds=60) is None is worker.too_long(len, "", seconds=60)
        pid = int(file.read_text())
    for _ in range(50):
        if not _alive(pid):
            break
        time.sleep(0.1)
    assert not _alive(pid), "what a call had started outlived it"


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] not in "ZX"
    except FileNotFoundError:
        return False


def test_each_gives_every_call_its_own_deadline(benchmarks: Path) -> None:
    import processes

    calls = {"slow": (time.sleep, (60,)), "wrong": (int, ("x",)), "a": (len, ("a",)), "b": (len, ("bb",))}
    answers = {a.name: a for a in processes.each(calls, workers=2, seconds=8, until=time.monotonic() + 120)}
    assert set(answers) == set(calls)
    assert answers["slow"].error == "not ready within 8 s" and "ValueError" in answers["wrong"].error
    assert (answers["a"].value, answers["b"].value) == (1, 2) and answers["a"].error is None


def test_what_the_end_meets_has_no_answer(benchmarks: Path) -> None:
    import processes

    with processes.Worker() as worker:
        worker.call(len, "a", seconds=60)  # torch is imported by now
    calls = {"first": (len, ("a",)), "slow": (time.sleep, (60,)), "never": (len, ("a",))}
    answers = list(processes.each(calls, workers=1, seconds=50, until=time.monotonic() + 10))
    assert [a.name for a in answers] == ["first"]
    assert list(processes.each(calls, workers=1, seconds=50, until=time.monotonic())) == []
