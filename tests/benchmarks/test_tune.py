"""A sweep of launch configurations writes a table that the kernels take, and keeps lines that nothing beats."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

table = pytest.importorskip("attnres.ops.triton.table")


def test_a_sweep_writes_a_table_that_can_be_loaded(benchmarks: Path, tmp_path: Path) -> None:
    file = tmp_path / "launch.json"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(benchmarks.parent / "src")}
    flags = ["--out", str(file), "--quick", "--kernels", "add_norm_backward", "--widths", "512"]
    command = [sys.executable, str(benchmarks / "tune.py"), *flags]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    document = json.loads(file.read_text())
    line = document["table"]["add_norm_backward"]["512"]
    assert document["microseconds"]["add_norm_backward"]["512"]["now"] > 0 and document["torch"]
    show = (
        "from attnres.ops.triton import table as t; print(dict(t.launch_table()['add_norm_backward'][512]._asdict()))"
    )
    environment["ATTNRES_LAUNCH"] = str(file)
    loaded = subprocess.run([sys.executable, "-c", show], env=environment, capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == str(line)


def test_candidates_vary_what_a_kernel_uses(benchmarks: Path) -> None:
    import tune

    for kernel, lines in table.launch_table().items():
        for width, line in lines.items():
            found = tune.candidates(kernel, width)
            assert found[0] == line._asdict() and len({str(c) for c in found}) == len(found) > 1
            for field in ("tile", "programs", "stages"):
                if {getattr(other, field) for other in lines.values()} == {1}:
                    assert {candidate[field] for candidate in found} == {1}


def test_a_line_that_changes_the_result_or_fails_is_no_candidate(
    benchmarks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from contextlib import contextmanager

    import torch
    import tune

    from attnres import ops

    plain, chosen = ops.rms_norm, []

    @contextmanager
    def override(kernel, **line):
        chosen.append(line["warps"])
        yield
        chosen.pop()

    def sensitive(h, norm):
        if chosen == [4]:
            raise RuntimeError("out of resources")
        return plain(h, norm) * (1.01 if chosen == [2] else 1)

    monkeypatch.setattr(tune, "override", override)
    monkeypatch.setattr(ops, "add_norm", lambda a, b, norm: (a + b, sensitive(a + b, norm)))
    spec = tune.Spec("add + norm", 32, 4, dtype="float32", repeats=1)
    times = tune.times("add_norm_forward", spec, [{"warps": warps} for warps in (1, 2, 4, 8)])
    assert [us is not None for us in times] == [True, False, False, True]
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("kernel", list(table.launch_table()))
def test_what_is_timed_takes_the_line(benchmarks: Path, monkeypatch: pytest.MonkeyPatch, kernel: str) -> None:
    import tune

    from attnres import ops
    from attnres.ops.triton import launch

    asked, line = [], launch.line
    monkeypatch.setattr(launch, "line", lambda name, width: asked.append(name) or line(name, width))
    monkeypatch.setattr(ops.dispatch, "_choice", "triton")
    spec = tune.replace(tune.spec_of(kernel, 512), width=32, tokens=2)
    shared, rows, call = tune.jobs.inputs(tune.jobs.open_bench(), spec)
    outputs = call(shared, rows)
    if kernel.endswith("backward"):
        asked.clear()
        tune.torch.autograd.grad(outputs, [*shared, *rows], tune.jobs.directions_of(outputs))
    assert kernel in asked
