"""Both benchmarks run to the end on a CPU, and a rival that fails is listed and never timed."""

import contextlib
import json
import os
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pytest
import torch

RIVALS = {"fla Triton", "fla Gluon", "flash-attn-res", "fast-attnres", "liger-kernel"}


def run(script: Path, out: Path, *flags: str) -> tuple[dict, str]:
    command = [sys.executable, str(script), "--quick", "--device", "cpu", "--repeats", "1", "--out", str(out), *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(script.parents[1] / "src")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    name = f"{script.stem}_cpu_quick"
    assert {f.name for f in out.iterdir()} == {f"{name}.json", f"{name}.md"}
    return json.loads((out / f"{name}.json").read_text()), (out / f"{name}.md").read_text()


def test_ops(benchmarks: Path, tmp_path: Path) -> None:
    document, page = run(benchmarks / "ops.py", tmp_path)
    assert set(document["missing"]) == RIVALS and document["not reached"] == [] and document["failed"] == {}
    assert document["copy rate, TB/s"] > 0 and document["device"] and document["torch"] == torch.__version__
    titles = ["residual path", "phase 1", "phase 2", "read", "add + norm"]
    assert [title.split(",")[0] for title in document["cases"]] == titles
    for title, case in document["cases"].items():
        assert case["left_out"] == {} and f"## {title}" in page
        assert {"attnres"} < set(case["rows"]) or title.startswith("phase 2")
        for row in case["rows"].values():
            assert row["forward"]["median"] > 0 and row["backward"]["median"] > 0
            assert row["error"] is None or row["error"] < 1e-5
    read = next(case for title, case in document["cases"].items() if title.startswith("read"))
    assert read["rows"]["attnres"]["moved"] == [4 * 64 * 32 * 4, 7 * 64 * 32 * 4]  # n + 1 and 2n + 1 fp32 rows, n = 3
    assert read["rows"]["straightforward"]["error"] > 0


def test_training(benchmarks: Path, tmp_path: Path) -> None:
    document, page = run(benchmarks / "training.py", tmp_path, "--dtype", "float32")
    assert set(document["missing"]) == RIVALS and document["not reached"] == [] and document["failed"] == {}
    rows = [row for group in document["groups"].values() for row in group["rows"]]
    found = {(row["residual"], row["op"], row["mode"]) for row in rows}
    assert {("prenorm", "add + norm", mode) for mode in ("eager", "checkpointed")} < found
    assert {(name, "attnres", "eager") for name in ("block_attnres", "full_attnres")} < found
    assert ("block_attnres", "straightforward", "eager") in found
    for row in rows:
        assert row["tokens_per_second"] == pytest.approx(32 / (1e-3 * row["step_ms"]["median"]))
        assert row["throughput_ratio"] == 1 if row["residual"] == "prenorm" else row["throughput_ratio"] > 0
        if row["op"] == "straightforward":
            assert 0 < row["error"] < 1e-4
    assert all(f"## {title}" in page for title in document["groups"])


def test_decoder_step(benchmarks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import decoder_step
    import timing

    shape = dict(hidden_size=32, num_hidden_layers=4, num_attention_heads=2, max_position_embeddings=16)
    for name, value in (("TOKENS", 32), ("WIDTH", 32), ("CONTEXT", 16), ("SHAPE", shape)):
        monkeypatch.setattr(decoder_step, name, value)
    transformed = []
    monkeypatch.setattr(timing, "compiled", lambda model: transformed.append(model) or model)  # that takes minutes
    flags = ["--device", "cpu", "--repeats", "1", "--out", str(tmp_path), "--only", "steps", "compiled"]
    monkeypatch.setattr(sys, "argv", ["decoder_step.py", *flags])
    decoder_step.main()
    tables = json.loads((tmp_path / "decoder_step_cpu.json").read_text())["milliseconds"]
    ours = ["prenorm", "block_attnres", "full_attnres"]
    for dtype in ("float32", "bfloat16"):
        assert list(tables[f"decoder step, compiled, {dtype}"]) == ours
        assert list(tables[f"decoder step, {dtype}"]) == [*ours, *(f"{name}, straightforward" for name in ours[1:])]
    assert [model.config.residual for model in transformed] == ours * 2
    assert all(row["median"] > 0 for table in tables.values() for row in table.values())


def bench(**rivals):
    import cases

    return cases.Bench(torch.device("cpu"), torch.float32, rivals, compiled=False)


def test_a_rival_that_fails_is_left_out_with_the_reason(benchmarks: Path) -> None:
    import cases
    import timing

    import ops
    from attnres.bench import rivals

    def wrong(*args):
        return 1.01 * rivals.straightforward(*args)

    def wrong_gradient(query, *args):
        return rivals.straightforward(query.detach() + 0.9 * (query - query.detach()), *args)

    def not_a_number(*args):
        return rivals.straightforward(*args) * float("nan")

    def broken(*args):
        raise RuntimeError("no kernel\nimage")

    def endless(*args):
        while True:
            with contextlib.suppress(Exception):
                time.sleep(5)

    reads = {f.__name__: f for f in (wrong, wrong_gradient, not_a_number, broken, endless)}
    case = cases.read(bench(**{name: rivals.Rival(name, f) for name, f in reads.items()}), 8, 16, 3)
    rows = ops.measure(case, bench(), timing.Budget(100), seconds_to_prepare=10, repeats=1)
    assert list(rows) == ["attnres"]
    assert "relative error 0.01" in case.left_out["wrong"]
    assert "disagrees" in case.left_out["wrong_gradient"] and "inf" in case.left_out["not_a_number"]
    assert case.left_out["broken"] == "RuntimeError: no kernel image"
    assert "not ready within" in case.left_out["endless"]


def test_a_rival_that_overruns_in_its_rehearsal_never_runs_here(benchmarks: Path) -> None:
    import cases
    import timing

    import ops
    from attnres.bench import rivals

    def never(*args):
        raise AssertionError("called")

    asked = []

    def rehearse(name):
        asked.append(name)
        return "not ready within 3 s"

    case = cases.read(bench(**{"fla Triton": rivals.Rival("fla Triton", never)}), 8, 16, 3)
    rows = ops.measure(case, bench(), timing.Budget(60), 3, 1, rehearse)
    assert list(rows) == ["attnres"] and asked == ["fla Triton"]
    assert case.left_out == {"fla Triton": "not ready within 3 s"}


def test_a_rehearsal_prepares_one_variant_by_itself(benchmarks: Path) -> None:
    import processes

    import ops

    quick = (torch.device("cpu"), torch.float32, True)
    with processes.Worker() as worker:
        assert worker.call(ops.rehearse, "read", "straightforward", *quick, seconds=100) is None
        with pytest.raises(processes.Failed, match="fla Triton"):
            worker.call(ops.rehearse, "read", "fla Triton", *quick, seconds=100)


def test_a_spent_budget_leaves_everything_out(benchmarks: Path) -> None:
    import cases
    import timing

    import ops

    case = cases.add_norm(bench(), 8, 16)
    assert ops.measure(case, bench(), timing.Budget(0), seconds_to_prepare=3, repeats=1) == {}
    assert set(case.left_out.values()) == {"the time budget was spent"}


def test_plugged_reads_are_the_rivals(benchmarks: Path) -> None:
    from attnres.bench import rivals
    from attnres.residual import BlockAttnRes

    counts = []

    def read(query, sources, key_norm, eps, norm):
        counts.append(len(sources))
        return rivals.straightforward(query, sources, key_norm, eps, norm)

    plugged = rivals.plug(BlockAttnRes(16, 5, block_size=2), rivals.Rival("spy", read))
    norm = torch.nn.RMSNorm(16, 1e-6)
    state = plugged.start(torch.randn(3, 16))
    for layer in range(5):
        x, state = plugged.read(state, layer, norm)
        state = plugged.write(state, layer, x.sin())
    plugged.finish(state, norm)
    assert counts == [2, 2, 3, 3, 4]  # the first layer sees the embedding alone


@pytest.mark.parametrize("name", ["block_attnres", "full_attnres"])
def test_a_plugged_rival_in_two_phases_agrees(benchmarks: Path, name: str) -> None:
    from attnres import ops, residual
    from attnres.bench import rivals

    torch.manual_seed(0)
    ours = residual.build(name, 16, 6, **({"block_size": 3} if name == "block_attnres" else {})).double()
    torch.nn.init.normal_(ours.pseudo_query)
    torch.nn.init.uniform_(ours.key_norm, 0.5, 2)
    counts = []

    def inter_block(queries, sources, key_norms, eps):
        counts.append((len(queries), len(sources)))
        return ops.inter_block(queries, sources, key_norms, eps)

    rival = rivals.Rival("spy", None, inter_block, ops.merge)
    embedding, norm = torch.randn(3, 16, dtype=torch.float64), torch.nn.RMSNorm(16, 1e-6).double()
    results = []
    for network in (ours, rivals.plug(ours, rival)):
        state = network.start(embedding)
        for layer in range(6):
            x, state = network.read(state, layer, norm)
            state = network.write(state, layer, (layer + 1) * x.sin())
        h = network.finish(state, norm)
        h.square().mul(torch.arange(16)).sum().backward()
        results.append([h, network.pseudo_query.grad, network.key_norm.grad])
    for theirs, expected in zip(*reversed(results), strict=True):
        torch.testing.assert_close(theirs, expected)
    # the first block is read layer by layer, the second in one phase and merges, the head by itself
    assert counts == ([(1, 2), (1, 2), (3, 2), (1, 3)] if name == "block_attnres" else [(1, n) for n in range(2, 8)])


def test_captured_graphs_keep_what_they_read(benchmarks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import inference

    pasts, graphs = [], []

    class Cache(inference.KeyValueCache):
        def update(self, key_states, value_states, layer_idx):
            first = layer_idx not in self.keys
            result = super().update(key_states, value_states, layer_idx)
            if first:
                pasts.append([weakref.ref(tensor) for tensor in result])
            return result

    class Graph:
        """Replays of what is captured on a GPU read memory that they do not own."""

        def __init__(self):
            graphs.append(self)

        def replay(self):
            assert pasts and all(tensor() is not None for past in pasts for tensor in past)

    class Stream:
        def __init__(self, device=None):
            pass

        def wait_stream(self, other):
            pass

    none = contextlib.nullcontext
    fakes = dict(CUDAGraph=Graph, Stream=Stream, current_stream=Stream, stream=lambda s: none(), graph=lambda g: none())
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(inference, "KeyValueCache", Cache)
    device = torch.device("cpu")
    times = inference.replay(inference.make(inference.Shape(64, 2, "float32"), device), 1, 2, device)
    assert len(graphs) == len(times) == len(inference.RESIDUALS) and len(pasts) == 2 * len(graphs)


def test_moe(benchmarks: Path, tmp_path: Path) -> None:
    document, page = run(benchmarks / "moe.py", tmp_path)
    assert [row["dtype"] for row in document["rows"]] == 2 * ["float32", "bfloat16"]
    assert [(row["threads"], row["clock"]) for row in document["rows"][::2]] == [(1, "processor"), (2, "wall")]
    for row in document["rows"]:
        assert row["ratio"] == row["experts"]["median"] / row["dense"]["median"] > 0
    assert "8 experts, d=16;" in page


def test_kda(benchmarks: Path, tmp_path: Path) -> None:
    document, page = run(benchmarks / "kda.py", tmp_path)
    rows = document["microseconds per token"]
    assert list(rows) == ["16", "32", "64"] and all(
        set(r) == {"chunks", "softmax", "recurrence"} for r in rows.values()
    )
    for part in ("forward", "forward and backward"):
        assert f"## {part}" in page
        long, short = (rows[tokens]["chunks"][part]["median"] for tokens in ("64", "32"))
        assert document["growth from 32 to 64"]["chunks"][part] == long / short > 0
