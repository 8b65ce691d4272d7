"""The campaign asks its questions in child processes, saves each answer, goes on where it stopped, and says how far the
aims are."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch


def campaign(folder: Path, *flags: str) -> subprocess.CompletedProcess:
    script = Path(__file__).parents[2] / "benchmarks" / "campaign.sh"
    command = [
        "bash",
        str(script),
        "--quick",
        "--out",
        str(folder / "out"),
        "--scratch",
        str(folder / "scratch"),
        *flags,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHON": sys.executable}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


def test_a_campaign_goes_on_where_it_stopped(tmp_path: Path) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    refused = campaign(tmp_path, "--wheels", str(wheels))
    assert refused.returncode == 2 and f"no wheels in {wheels}" in refused.stderr

    first = campaign(tmp_path, "--only", "decode")
    assert first.returncode == 0, first.stderr
    out = tmp_path / "out"
    assert {f.name for f in out.iterdir()} == {"results.json", "summary.md"}
    document = json.loads((out / "results.json").read_text())
    assert document["results"]["decode"]["batch 1"]["value"]["Block"]["ratio"] > 0
    assert list(document["results"]) == ["decode"] and "rivals" in document["left"] and "decode" not in document["left"]

    again = campaign(tmp_path, "--only", "decode")
    assert again.returncode == 1 and "--resume" in again.stderr and "Traceback" not in again.stderr
    assert json.loads((out / "results.json").read_text()) == document

    more = campaign(tmp_path, "--only", "decode", "published", "rivals", "--resume")
    assert more.returncode == 0, more.stderr
    resumed = json.loads((out / "results.json").read_text())
    assert resumed["results"]["decode"] == document["results"]["decode"] and "decode:" not in more.stdout
    (read,) = resumed["results"]["published shapes"].values()
    assert read["value"]["us"]["median"] > 0 and read["call"] == 1
    rivals = resumed["results"]["rivals"]
    assert rivals["flash-attn-res: read"]["failed"] == "RuntimeError: flash-attn-res is not installed"
    assert rivals["straightforward: read"]["value"]["rows"]["straightforward"]["error"] < 1e-4
    page = (out / "summary.md").read_text()
    assert "## decode" in page and "- flash-attn-res: read: RuntimeError" in page and "Left for another call" in page


READS = ["read", "read, no norm", "read, prior"]
PHASES = ["phase 1", "phase 1, norm", "phase 2", "phase 2, first"]


@pytest.mark.parametrize("op", [*READS, *PHASES, "add + norm", "norm"])
def test_every_op_agrees_and_is_timed(benchmarks: Path, op: str) -> None:
    import campaign_jobs as jobs

    spec = jobs.Spec(op, 16, 5, n=3, S=2, dtype="float32", repeats=1)
    found = jobs.check(spec)
    assert 0 < found["error"] < 1e-5
    timed = jobs.time_op(spec)
    passes = jobs.passes(spec)
    assert timed["moved"] == [*passes.bytes(5, 16, 4)] or timed["moved"] == passes.bytes(5, 16, 4)
    assert timed["forward"]["median"] > 0 and timed["backward"]["median"] > 0


def test_an_element_that_nothing_wrote_is_found(benchmarks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import campaign_jobs as jobs

    from attnres import ops

    def lazy(h, norm):
        if h.dtype == torch.float64:  # what it is compared with
            return h * torch.rsqrt(h.square().mean(-1, keepdim=True) + norm[1]) * norm[0]
        out = torch.empty_like(h)
        out[:-1] = torch.nn.functional.rms_norm(h, h.shape[-1:], norm[0], norm[1])[:-1]
        return out

    monkeypatch.setattr(ops, "rms_norm", lazy)
    with pytest.raises(RuntimeError, match="disagrees with fp64: relative error inf"):
        jobs.check(jobs.Spec("norm", 16, 5, dtype="float32"))


def test_decoders_take_turns(benchmarks: Path) -> None:
    import turns
    from decoders import Row, shape

    tiny = shape("d=16, 1 block", 16, 1, 8, sequences=2, context=8)
    rows = (Row("prenorm"), Row("block_attnres"), Row("block_attnres", "fla Triton"))
    groups = {"tiny": turns.Group(tiny, rows, rounds=2)}
    (answer,) = turns.measure(groups, 200, time.monotonic() + 300)
    found = answer.value["rows"]
    assert [row["residual"] for row in found] == ["prenorm", "block_attnres"]
    assert found[0]["throughput_ratio"] == 1 and found[1]["throughput_ratio"] > 0
    assert list(answer.value["left out"]) == ["block_attnres, fla Triton, eager"]
    assert list(turns.measure(groups, 200, time.monotonic())) == []


def test_a_run_that_time_meets_is_unfinished(benchmarks: Path, tmp_path: Path) -> None:
    import campaign_run

    assert campaign_run.call(["sleep", "60"], tmp_path / "log.txt", time.monotonic() + 1) is None
    words = [sys.executable, "-c", "raise SystemExit('no data')"]
    assert campaign_run.call(words, tmp_path / "log.txt", time.monotonic() + 60) == "exit code 1: no data"
    assert campaign_run.outcome(tmp_path) is None
    records = [{"step": 10, "loss": 2.0}, {"step": 12, "val_loss": 1.5}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n")
    expected = {"unfinished": True, "step": 12, "val_curve": {"step": [12], "val_loss": [1.5]}}
    assert campaign_run.outcome(tmp_path) == expected


def test_aims_are_measured_against_the_copy_rate_of_their_call(benchmarks: Path) -> None:
    import campaign_page
    from campaign import ops_of

    spread = {"median": 2.0, "min": 1.0, "max": 3.0}
    names = {spec.name: spec for width in (2048, 7168) for spec in ops_of(width)}
    k3, nine, path = (
        "phase 1, n=8 S=24 D=7168 T=8192",
        "read, n=9 D=2048 T=16384",
        "path, Block, L=32 S=8 D=2048 T=16384",
    )
    assert {k3, nine, path} <= set(names)  # the page finds its aims by these names
    op = {"forward": spread, "backward": spread, "moved": [1e9, 3e9]}
    step = {"residual": "block_attnres", "throughput_ratio": 0.97, "memory_ratio": 1.05}
    value = {
        "rows": [{**step, "row": "x", "step_ms": spread, "tokens_per_second": 1, "peak_memory_bytes": 1, "error": None}]
    }
    document = {
        "calls": [{"copy rate": 1e12}, {"copy rate": 2e12}],
        "results": {
            "ops": {
                nine: {"call": 1, "value": op},
                path: {"call": 0, "value": {"rows": {"attnres": op}, "moved": {}}},
            },
            "ops, other widths": {k3: {"call": 0, "value": op}},
            "training, compiled": {"d=2048, 16 blocks, 16384 tokens": {"call": 0, "value": value}},
        },
    }
    page = campaign_page.lines(document)
    assert "| read backward, chained, D=2048 n=9, of the copy rate | 80 % | 75 % |" in page
    assert "| phase 1 forward, D=7168 n=8 S=24 | 75 % | 50 % |" in page
    assert "| residual path, T=16384 D=2048 L=32 S=8 | 10.5 ms | 4.00 ms |" in page
    assert "| step compiled, Block, d=2048 | 0.97 | 0.970 (memory 1.05) |" in page
