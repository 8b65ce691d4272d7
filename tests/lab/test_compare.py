"""Comparisons: what is equal between the runs, what the numbers mean, and that an interrupted one goes on."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from functools import partial

import pytest
import torch

from attnres import residual
from attnres.analysis.measure.worth import in_words
from attnres.commands.compare import table
from attnres.errors import Failure, UsageError
from attnres.lab import grid
from attnres.lab.compare import CompareConfig, summarise
from attnres.lab.grid import write_json
from attnres.model import Decoder, DecoderConfig
from attnres.model.decoder import initial_std
from attnres.run.config import TrainConfig

from ..command_line import AT_STEP, kill, needs_full_device

NAMES = ["prenorm", "block_attnres", "full_attnres"]

# Runs are forked, not spawned: then the patches reach them too, and they need not import torch again. As those of the
# fork server they have no file of their parent, nor its lock on a folder.
FORK = """
import contextlib, multiprocessing, os, stat
def leave_folders():
    for number in range(3, 99):
        with contextlib.suppress(OSError):
            if stat.S_ISDIR(os.fstat(number).st_mode):
                os.close(number)
os.register_at_fork(after_in_child=leave_folders)
real = multiprocessing.get_context
multiprocessing.get_context = lambda name: real("fork")
"""


def in_run(name, step, action):
    """A patch for what one of the runs does before a step."""
    return FORK + AT_STEP.format(step=step, action=f"if self.config.model.residual == {name!r}: {action}")


def results(out):
    return json.loads((out / "results.json").read_text())


def said(end):
    return end.err.splitlines()[-1]


@pytest.fixture(scope="module")
def compared(server, tiny, tmp_path_factory):
    """The folder of a comparison of three mechanisms over two seeds, and how its command ended."""
    out = tmp_path_factory.mktemp("compared")
    end = server.run("compare", *tiny, "--seeds", "0,1", "--residual.num-blocks", 2, "--out", out, patch=FORK)
    assert end.status == 0, end.err
    return out, end


def test_shared_weights_start_equal():
    shape = dict(hidden_size=32, num_hidden_layers=2)
    plain = Decoder(DecoderConfig(**shape, residual="prenorm"), seed=7)
    for model in (Decoder(DecoderConfig(**shape, residual=name), seed=7) for name in residual.names()):
        own = dict(model.named_parameters())
        assert "layers.3.down_proj.weight" in own
        for name, weight in plain.named_parameters():
            if name in own:  # a mechanism may do without norms, and may prescribe another scale
                module = name.removesuffix(".weight")
                factor = initial_std(model, module) / initial_std(plain, module) if weight.dim() == 2 else 1
                torch.testing.assert_close(own[name], weight * factor, rtol=1e-6 * (factor != 1), atol=0)


def test_runs_begin_at_the_same_loss_on_the_same_batch(compared):
    """Zero queries compute the PreNorm function: equal weights and data give equal losses before the first update."""
    for seed in (0, 1):
        runs = [run for run in results(compared[0])["runs"] if run["seed"] == seed]
        assert [run["residual"] for run in runs] == NAMES
        for curve, value in (("curve", "loss"), ("val_curve", "val_loss")):
            first = [run[curve][value][0] for run in runs]
            assert first == pytest.approx([first[0]] * 3, abs=1e-5)
            last = [run[curve][value][-1] for run in runs]
            assert len(set(last)) == 3
    seeds = [run["curve"]["loss"][0] for run in results(compared[0])["runs"] if run["residual"] == "prenorm"]
    assert abs(seeds[0] - seeds[1]) > 1e-3


def test_results_hold_everything_a_reader_needs(compared):
    found = results(compared[0])
    assert {*found} == {
        "command", "version", "commit", "torch", "python", "device", "dtype", "date", "corpus", "model", "train",
        "baseline", "runs", "summary",
    }  # fmt: skip
    assert found["command"].startswith("attnres compare --data ")
    assert (found["baseline"], found["dtype"], found["train"]["steps"]) == ("prenorm", "float32", 10)
    assert found["corpus"]["name"] == "words.txt"
    for run in found["runs"]:
        assert (run["tokens"], run["curve"]["step"]) == (10 * 4 * 32, list(range(1, 11)))
        assert run["curve"]["tokens"] == [step * 4 * 32 for step in range(1, 11)]
        assert (run["val_curve"]["step"], run["val_loss"]) == ([0, 4, 8, 10], run["val_curve"]["val_loss"][-1])
        assert len(run["output_magnitude"]) == len(run["gradient_magnitude"]) == 2
        assert run["tokens_per_second"] > 0 and run["peak_memory_bytes"] > 10**7
    rows = {run["residual"]: [len(row) for row in run["depth_weights"] or []] for run in found["runs"]}
    assert rows == {"prenorm": [], "block_attnres": [1, 2, 2, 3, 3], "full_attnres": [1, 2, 3, 4, 5]}
    assert found["runs"][1]["parameters"] - found["runs"][0]["parameters"] == 2 * 5 * 32
    assert found["summary"] == summarise(found["runs"], NAMES)


def test_figures_and_report_are_written(compared):
    out, end = compared
    names = ["loss", "output_magnitude", "gradient_magnitude"] + [f"depth_attention_{name}" for name in NAMES[1:]]
    assert {path.name for path in (out / "figures").iterdir()} == {f"{n}.{s}" for n in names for s in ("png", "svg")}
    assert "<html" in (out / "report.html").read_text()
    assert f"report: {out}/report.html" in end.err
    assert all(label in end.out for label in ("val loss", "peak memory", *NAMES))
    assert end.out.count("(spread ") == 6


def test_summary_by_hand():
    def run(name, seed, val_loss, speed, memory):
        return dict(residual=name, seed=seed, parameters=len(name), tokens=50, val_loss=val_loss,
                    tokens_per_second=speed, peak_memory_bytes=memory)  # fmt: skip

    runs = [
        run("prenorm", 0, 2.0, 100, 10), run("prenorm", 5, 2.5, 200, 30),
        run("full_attnres", 0, 1.75, 50, 40), run("full_attnres", 5, 2.375, 150, 20),
    ]  # fmt: skip
    assert summarise(runs, ["prenorm", "full_attnres"]) == [
        dict(residual="prenorm", seeds=[0, 5], parameters=7, tokens=50, val_loss=2.25, val_loss_spread=0.5,
             difference=0.0, difference_spread=0.0, throughput_ratio=1.0, peak_memory_bytes=30),
        dict(residual="full_attnres", seeds=[0, 5], parameters=12, tokens=50, val_loss=2.0625, val_loss_spread=0.625,
             difference=-0.1875, difference_spread=0.125, throughput_ratio=0.625, peak_memory_bytes=40),
    ]  # fmt: skip
    one = summarise(runs[::2], ["prenorm", "full_attnres"])
    assert [row["val_loss_spread"] for row in one] == [row["difference_spread"] for row in one] == [None, None]
    assert one[1]["difference"] == -0.25
    shown = table({"summary": one}).splitlines()
    assert shown[3].split() == ["full_attnres", "12", "50", "1.7500", "-0.2500", "0.50x", "0", "MiB"]
    assert "one seed" in shown[-1]


def test_a_comparison_goes_on_after_kills_and_stops(server, tiny, compared, tmp_path):
    """A run is killed; Ctrl-C goes to all processes; the parent alone is killed and its child is left behind."""
    command = ["compare", *tiny, "--residual.num-blocks", 2, "--out", tmp_path]
    end = server.run(*command, patch=in_run("block_attnres", 5, kill("SIGKILL")))
    assert (end.status, "[2/3] block_attnres, seed 0" in end.err) == (1, True)
    assert said(end) == (
        f"attnres compare: the run in {tmp_path}/runs/block_attnres-seed0 ended with exit code -9; "
        "call again to continue"
    )
    first = (tmp_path / "runs" / "prenorm-seed0" / "result.json").stat()

    end = server.run(*command, patch=in_run("block_attnres", 6, "os.killpg(0, signal.SIGINT); until_stopped()"))
    assert (end.status, said(end)) == (130, "attnres compare: stopped")
    assert f"stopped in {tmp_path}/runs/block_attnres-seed0; call again to continue" in end.err
    assert "stopped at step 6, saved as" in end.err

    process = server.start(*command, patch=in_run("full_attnres", 5, "until_stopped()"))
    process.wait_for(lambda: (tmp_path / "runs" / "full_attnres-seed0" / "checkpoints").exists())
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait().status == -signal.SIGKILL
    end = server.run(*command, patch=FORK)  # it may find the orphan still at work
    assert end.status == 0, end.err
    assert f"saved as {tmp_path}/runs/full_attnres-seed0/checkpoints/step-" in process.err()
    assert "prenorm, seed 0" not in end.err and "block_attnres, seed 0" not in end.err

    assert (tmp_path / "runs" / "prenorm-seed0" / "result.json").stat().st_mtime_ns == first.st_mtime_ns
    timing = ("tokens_per_second", "peak_memory_bytes")
    for run, expected in zip(results(tmp_path)["runs"], results(compared[0])["runs"], strict=False):
        assert {k: v for k, v in run.items() if k not in timing} == {
            k: v for k, v in expected.items() if k not in timing
        }


def test_two_processes_cannot_share_a_folder(server, tiny, tmp_path):
    command = ["compare", *tiny, "--residuals", "prenorm", "--out", tmp_path]
    first = server.start(*command, patch=in_run("prenorm", 2, f"until_exists({str(tmp_path / 'go')!r})"))
    first.wait_for(lambda: (tmp_path / "runs" / "prenorm-seed0" / "metrics.jsonl").exists())
    for second in (command, ["lab", "dynamics", *tiny, "--residuals", "prenorm", "--out", tmp_path]):
        end = server.run(*second, patch=FORK)
        assert (end.status, "prenorm, seed 0" in end.err) == (1, False)
        assert f"another process works in {tmp_path}: wait for its end, or choose another --out" in said(end)
    (tmp_path / "go").touch()
    assert first.wait().status == 0
    assert server.run(*command, patch=FORK).status == 0  # the folder is free again


def test_sigterm_stops_a_comparison(server, tiny, tmp_path):
    patch = in_run("prenorm", 4, "os.kill(os.getppid(), signal.SIGTERM); until_stopped()")
    end = server.run("compare", *tiny, "--out", tmp_path, patch=patch)
    assert end.status == 143
    assert said(end) == f"stopped in {tmp_path}/runs/prenorm-seed0; call again to continue"
    assert (tmp_path / "runs" / "prenorm-seed0" / "checkpoints" / "step-00000004").exists()
    assert "Traceback" not in end.err


def test_another_comparison_in_the_folder_is_refused_before_any_run(server, tiny, compared):
    out, _ = compared
    before = (out / "results.json").read_bytes()
    end = server.run("compare", *tiny, "--seeds", "2,0", "--residual.num-blocks", 3, "--out", out, patch=FORK)
    assert end.status == 2
    assert f"out holds another comparison, choose another --out: in {out}/runs/block_attnres-seed0" in said(end)
    assert "num_blocks (2 in the checkpoint, 3 now)" in said(end)
    assert not (out / "runs" / "prenorm-seed2").exists()
    assert (out / "results.json").read_bytes() == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--residuals prenorm,prenorm", "residuals must name at least one, each once; it is 'prenorm, prenorm'"),
        ("--residuals prenorm,blok", "residual 'blok' is unknown; did you mean 'block_attnres'"),
        ("--seeds 0,x", "--seeds must be whole numbers separated by commas; it is '0,x'"),
        ("--seeds -1", "seed must be zero or more; it is -1"),
        ("--seed 3", "Unrecognized options: --seed, 3"),
        ("--residual.name prenorm", "Unrecognized options: --residual.name, prenorm"),
        ("--residuals prenorm,full_attnres --residual.num-blocks 2", "--residual.num-blocks is an option of none of"),
        ("--residual.num-blocks 2 --residual.block-size 2", "give block_size or num_blocks, not both"),
        ("--data missing.txt", "--data 'missing.txt' does not exist"),
        ("--context 10000", "context must be at most the model's max_position_embeddings"),
    ],
)
def test_bad_input_is_refused_before_any_run(server, tiny, tmp_path, flags, message):
    end = server.run("compare", *tiny, "--validation-tokens", 10000, "--out", tmp_path / "out", *flags.split())
    assert end.status == 2
    assert len(end.err.splitlines()) == 1 and message in end.err
    assert not (tmp_path / "out").exists()


def test_missing_matplotlib_is_found_before_any_run(server, tiny, tmp_path):
    end = server.run("compare", *tiny, "--out", tmp_path / "out", patch="import sys; sys.modules['matplotlib'] = None")
    assert end.status == 2
    assert said(end).endswith("install it with: pip install 'attnres[train]'")
    assert not (tmp_path / "out").exists()


def test_what_a_run_says_reaches_the_command(server, tiny, tmp_path):
    command = ["compare", *tiny, "--residuals", "prenorm", "--out"]
    (tmp_path / "short.txt").write_text("too short for a context")
    end = server.run(*command, tmp_path / "corpus", "--data", tmp_path / "short.txt", patch=FORK)
    assert (end.status, "fewer than context + 1 = 33; give a larger corpus" in said(end)) == (2, True)
    poison = in_run("prenorm", 4, "self.model.layers[1].up_proj.weight.data.fill_(float('nan'))")
    end = server.run(*command, tmp_path / "poison", patch=poison)
    assert (end.status, "step 4: the loss is nan; the output of layer 1" in said(end)) == (1, True)
    assert "Traceback" not in end.err
    end = server.run(*command, tmp_path / "bug", patch=in_run("prenorm", 4, "1 / 0"))
    assert said(end).endswith(
        "unexpected ZeroDivisionError: division by zero; run again with --debug for the traceback"
    )
    end = server.run(*command, tmp_path / "bug", "--debug", patch=in_run("prenorm", 4, "1 / 0"))
    assert "in step" in end.err, "the traceback is that of the run"


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere getrusage is all there is")
def test_peak_memory_is_the_run_s_own(server, tiny, tmp_path):
    """In spawned processes, as users have them: getrusage would report the size of the process that started them."""
    large = "import builtins; builtins.ballast = b'x' * (1 << 30)"
    end = server.run("compare", *tiny, "--residuals", "prenorm", "--steps", 1, "--checkpoint-every", 1,
                     "--optim.warmup-steps", 0, "--out", tmp_path, patch=large)  # fmt: skip
    assert end.status == 0, end.err
    assert 10**8 < results(tmp_path)["runs"][0]["peak_memory_bytes"] < 9 * 10**8


def test_the_shape_is_shared_and_the_rest_is_not(tmp_path):
    train = TrainConfig(out=tmp_path, model=DecoderConfig(hidden_size=32, residual="prenorm"))
    options = {"block_attnres": {"num_blocks": 3}}
    runs = CompareConfig(residuals=("prenorm", "block_attnres"), seeds=(4, 9), train=train, residual_options=options)
    found = [(r.model.residual, r.seed, r.model.residual_options, r.model.hidden_size, r.out) for r in runs.runs()]
    assert found == [
        (name, seed, options.get(name, {}), 32, tmp_path / "runs" / f"{name}-seed{seed}")
        for seed in (4, 9)
        for name in ("prenorm", "block_attnres")
    ]
    with pytest.raises(UsageError, match="seeds must name at least one"):
        CompareConfig(seeds=())


@needs_full_device
def test_results_are_whole_or_absent(tmp_path):
    (tmp_path / "results.json.tmp").symlink_to("/dev/full")
    with pytest.raises(Failure, match=r"cannot write .*results.json: No space left on device; free some space"):
        write_json(tmp_path / "results.json", {"a": 1})
    assert list(tmp_path.iterdir()) == []


def test_the_commit_is_that_of_this_code(tmp_path, monkeypatch):
    """Not that of the repository which a virtual environment lies in."""
    if shutil.which("git") is None:
        pytest.skip("needs git")
    run = partial(subprocess.run, cwd=tmp_path, check=True, capture_output=True)
    author = ["-c", "user.name=a", "-c", "user.email=a@b"]
    run(["git", "init", "-q"])
    run(["git", *author, "commit", "-q", "--allow-empty", "-m", "another project"])
    (tmp_path / "grid.py").touch()
    monkeypatch.setattr(grid, "__file__", str(tmp_path / "grid.py"))
    assert grid._commit() is None
    run(["git", "add", "grid.py"])
    run(["git", *author, "commit", "-q", "-m", "this code"])
    assert run(["git", "rev-parse", "HEAD"]).stdout.decode().startswith(grid._commit())


def test_a_fork_server_that_was_killed_is_a_failure(tmp_path, monkeypatch):
    def killed(self):
        raise EOFError("unexpected EOF")

    monkeypatch.setattr(multiprocessing.context.ForkServerProcess, "start", killed)
    cell = grid.Cell("prenorm, seed 0", TrainConfig(out=tmp_path / "run"))
    with pytest.raises(Failure, match=r"no process could be started for prenorm, seed 0 \(EOFError\); call again"):
        grid.run_grid([cell])


def test_options_behind_a_name_make_rows_of_their_own(server, tiny, tmp_path):
    entries = ["prenorm", "block_attnres", "block_attnres:num_blocks=2:reads=mlp"]
    argv = ["--residuals", ",".join(entries), "--residual.num-blocks", 1, "--out", tmp_path / "out"]
    argv += ["--longer-baseline", 1.5]
    end = server.run("compare", *tiny, *argv, patch=FORK)
    assert end.status == 0, end.err
    assert entries[2] in end.out
    found = results(tmp_path / "out")
    assert [run["residual"] for run in found["runs"]] == [row["residual"] for row in found["summary"]] == entries
    assert sorted(path.name for path in (tmp_path / "out" / "runs").iterdir()) == [
        "block_attnres-num_blocks=2-reads=mlp-seed0", "block_attnres-seed0", "prenorm-seed0", "prenorm-x1.5-seed0",
    ]  # fmt: skip
    longer = found["longer_baseline"]
    assert longer["times"] == 1.5 and longer["runs"][0]["tokens"] == 1.5 * found["runs"][0]["tokens"]
    assert "worth" in end.out and "by a run on 1.5 times as many" in end.out
    assert (tmp_path / "out" / "figures" / "depth_attention_block_attnres-num_blocks=2-reads=mlp.png").exists()
    assert "Block AttnRes, num_blocks=2, reads=mlp" in (tmp_path / "out" / "report.html").read_text()


def test_options_behind_a_name_win():
    config = CompareConfig(
        residuals=("block_attnres", "block_attnres:num_blocks=4:stream_scale=False", "full_attnres:window=None"),
        residual_options={"block_attnres": {"num_blocks": 2, "eps": 1e-5}, "full_attnres": {"window": 3}},
    )
    options = [run.model.residual_options for run in config.runs()]
    assert options == [
        {"num_blocks": 2, "eps": 1e-5},
        {"num_blocks": 4, "eps": 1e-5, "stream_scale": False},
        {"window": None},
    ]


@pytest.mark.parametrize(
    ("entry", "sentence"),
    [
        ("block", "residual 'block' is unknown; did you mean 'block_attnres'"),
        ("block_attnres:window=3", "residual 'block_attnres' has no option 'window'; it takes block_size, num_blocks,"),
        ("prenorm:eps=1", "residual 'prenorm' has no option 'eps'; it takes none"),
        ("block_attnres:num_blocks=four", "num_blocks in .* must be int or None; it is 'four'"),
        ("block_attnres:stream_scale=1", "stream_scale in .* must be bool; it is '1'"),
        (
            "block_attnres:num_blocks",
            "must be a name and options, each once, as in block_attnres:option=value; see 'num_b",
        ),
        ("block_attnres:", "as in block_attnres:option=value; see ''"),
        ("block_attnres:eps=1:eps=2", "each once, .*; see 'eps=2'"),
        ("block_attnres:eps=1e-6,block_attnres:eps=0.000001", "residuals must name each once; two of"),
    ],
)
def test_options_that_make_no_sense_are_named(entry, sentence):
    with pytest.raises(UsageError, match=sentence):
        CompareConfig(residuals=tuple(entry.split(",")))


def test_worth_is_the_length_at_which_the_baseline_has_the_loss():
    def run(name, seed, loss):
        return {"residual": name, "seed": seed, "val_loss": loss, "tokens_per_second": 1.0, "parameters": 1,
                "tokens": 1, "peak_memory_bytes": 1}  # fmt: skip

    losses = {"prenorm": (2.0, 2.2), "half": (1.95, 2.15), "more": (1.8, 2.0), "less": (2.1, 2.2)}
    runs = [run(name, seed, loss) for name, pair in losses.items() for seed, loss in enumerate(pair)]
    longer = {"times": 1.25, "runs": [run("prenorm", 0, 1.9), run("prenorm", 1, 2.1)]}
    worths = {row["residual"]: row["worth"] for row in summarise(runs, list(losses), longer)}
    assert worths["prenorm"] == pytest.approx(1) and worths["half"] == pytest.approx(1.25**0.5)
    assert [in_words(worths[name], 1.25) for name in losses] == ["1.00", "1.12", "over 1.25", "under 1"]
    longer["runs"][0]["val_loss"] = longer["runs"][1]["val_loss"] = 2.5
    assert [row["worth"] for row in summarise(runs, list(losses), longer)] == [None] * 4
    assert in_words(None, 1.25) == "unknown"


@pytest.mark.parametrize("times", [1, 0.5, float("nan"), 1e9])
def test_a_longer_baseline_must_be_longer(times):
    with pytest.raises(UsageError, match="longer_baseline must be over 1 and at most 100"):
        CompareConfig(longer_baseline=times)
