"""What a user meets who starts jobs with torchrun: processes that die, freeze or are stopped, restarts, refusals."""

import contextlib
import dataclasses
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from torch import distributed

from attnres.parallel.config import ParallelConfig
from attnres.parallel.rendezvous import agreed_name
from attnres.run.folder import newest_checkpoint, read_config

from . import runs
from .versions import SPLITS_BACKWARD

VICTIM = Path(__file__).with_name("victim.py")
FLAGS = """
    --device cpu --precision float32 --context 16 --batch-size 8 --steps 6 --checkpoint-every 2 --validate-every 4
    --validation-tokens 160 --log-every 1 --model.hidden-size 32 --model.num-hidden-layers 4
    --model.num-attention-heads 4 --model.num-key-value-heads 2
"""
LOST = r"attnres train \(rank \d\): lost contact with another process of the job, .* --resume \(.+\)"

pytestmark = pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="looks for processes in /proc")


class Job:
    """torchrun, as one node or several, with what it prints; `fault` is for victim.py."""

    def __init__(self, folder: Path, launch: str, *flags: object, nodes: int = 1, fault: str = "") -> None:
        self.folder = folder
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "ATTNRES_CACHE": str(folder.parent / "cache")}
        program = [VICTIM] if fault else ["-m", "attnres"]
        command = [sys.executable, "-m", "torch.distributed.run", *launch.split(), *program, "train"]
        folder.mkdir(exist_ok=True)
        with (folder / "err").open("w") as err:
            self.nodes = [
                subprocess.Popen(
                    [str(part) for part in (*command, "--out", folder / "run", *flags)],
                    env={**environment, "FAULT": fault} if fault else environment,
                    stdout=err,
                    stderr=err,
                    start_new_session=True,
                )
                for _ in range(nodes)
            ]

    @property
    def out(self) -> Path:
        return self.folder / "run"

    def wait(self) -> tuple[list[int], str]:
        """The exit statuses and all that was printed; none of its processes may be left."""
        statuses = [node.wait(300) for node in self.nodes]
        assert not self.processes(), "processes outlive their job"
        return statuses, (self.folder / "err").read_text()

    def processes(self) -> list[int]:
        """Those whose command line names the job's folder; torchrun gives each a session of its own."""
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                if f"{self.folder}/".encode() in path.read_bytes():
                    found.append(int(path.parent.name))
        return found

    def kill(self) -> None:
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for node in self.nodes:
            node.wait(10)


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Iterator:
    """start(name, ...) -> a Job in the folder of that name; none survives this module."""
    root, jobs = tmp_path_factory.mktemp("jobs"), []

    def started(name: str, *arguments: object, **options: object) -> Job:
        jobs.append(Job(root / name, *arguments, **options))
        return jobs[-1]

    yield started
    for job in jobs:
        job.kill()


@pytest.fixture(scope="module", autouse=True)
def frozen(start, corpus_file) -> Job:
    """A job of which one process stands still in its second step. It runs beside the tests, for it mostly waits."""
    split = ("--parallel.pp", 2, "--parallel.timeout", 20)
    return start(
        "frozen", "--standalone --nproc-per-node 2", "--data", corpus_file, *FLAGS.split(), *split, fault="1 SIGSTOP 2"
    )


def assert_clean(err: str) -> None:
    assert "unexpected" not in err and "Exception ignored" not in err, err


def assert_like_one_process(out: Path, alone: Path) -> None:
    """The curve of `out` is that of a single process with its settings, as far as it goes."""
    runs.run(dataclasses.replace(read_config(out), out=alone, parallel=ParallelConfig()))
    ours, theirs = runs.curve(out), runs.curve(alone)
    for name, values in ours.items():
        assert bool(values) == bool(theirs[name]), name  # a model without experts has no loads
        assert values == pytest.approx(theirs[name][: len(values)], rel=2e-6), name


def test_a_killed_process_ends_the_job_and_fewer_processes_go_on_until_one_is_stopped(start, corpus_file, tmp_path):
    split = ("--parallel.pp", 3, "--parallel.microbatches", 4, "--parallel.timeout", 60)
    flags = ("--data", corpus_file, *FLAGS.split())
    job = start("killed", "--standalone --nproc-per-node 3", *flags, *split, fault="1 SIGKILL 4")
    (status,), err = job.wait()
    assert status == 1 and re.search(LOST, err), err
    assert_clean(err)
    assert newest_checkpoint(job.out).name == "step-00000002"

    again = start("killed", "--standalone --nproc-per-node 2", "--resume", "--parallel.shard", 2, fault="1 SIGTERM 5")
    (status,), err = again.wait()
    assert status == 0, err
    assert f"stopped at step 5, saved as {job.out}/checkpoints/step-00000005; go on with --resume" in err
    assert_clean(err)
    assert_like_one_process(job.out, tmp_path / "alone")
    assert runs.curve(job.out)["step"] == [0, 1, 2, 3, 4, 4, 5]


def test_torchrun_restarts_a_job_of_two_nodes_from_its_last_checkpoint(start, corpus_file, tmp_path):
    with contextlib.closing(socket.create_server(("localhost", 0))) as free:
        port = free.getsockname()[1]
    launch = f"--nnodes 2 --nproc-per-node 1 --rdzv-backend c10d --rdzv-endpoint localhost:{port} --max-restarts 1"
    split = ("--parallel.pp", 2, "--parallel.timeout", 60)
    flags = ("--data", corpus_file, *FLAGS.split(), *split)
    job = start("restarted", launch, *flags, nodes=2, fault="1 SIGKILL 4 save")
    statuses, err = job.wait()
    assert statuses == [0, 0], err
    assert "step 6/6" in err
    assert_clean(err)
    assert_like_one_process(job.out, tmp_path / "alone")
    assert sorted(path.name for path in (job.out / "checkpoints").iterdir()) == ["step-00000004", "step-00000006"]


def test_a_job_that_does_not_fit_its_processes_is_refused_by_torchrun(start, corpus_file):
    job = start("refused", "--standalone --nproc-per-node 2", "--data", corpus_file, *FLAGS.split(), "--parallel.pp", 3)
    (status,), err = job.wait()
    assert status == 1 and "exitcode  : 2" in err
    assert re.search(r"attnres train \(rank \d\): parallel\.dp x .*: 1 x 1 x 1 x 3 = 3, and there are 2; ", err), err
    assert_clean(err)
    assert not job.out.exists()


def test_a_frozen_process_ends_the_job_by_the_timeout(frozen):
    (status,), err = frozen.wait()
    assert status == 1 and re.search(LOST, err) and "no answer from it for 20 s" in err, err
    assert_clean(err)
    assert runs.curve(frozen.out)["step"] == [0, 1]


REFUSALS = [
    ("", "1 x 1 x 1 x 1 = 1, and there are 4; "),
    ("--parallel.dp 2 --parallel.tp 3", "2 x 1 x 3 x 1 = 6, and there are 4; change one of them, or start 6 processes"),
    ("--parallel.dp 4 --batch-size 6", "6 sequences over 4 x 1 = 4 leave 2 over"),
    ("--parallel.tp 4", "num_key_value_heads must be a multiple of parallel.tp: 2 over 4 leaves 2 over"),
    (
        "--parallel.tp 2 --parallel.dp 2 --context 15",
        "context must be a multiple of parallel.tp: 15 over 2 leaves 1 over",
    ),
    ("--parallel.pp 4 --parallel.microbatches 3", "8 sequences over 3 micro-batches leave 2 over"),
    (
        "--parallel.pp 4 --parallel.virtual-stages 4 --parallel.schedule LoopedBFS",
        "4 x 4 = 16 pieces, and 4 x 2 = 8 layers",
    ),
    ("--parallel.pp 4 --parallel.schedule 1F1B --parallel.microbatches 2", "microbatches is 2, and there are 4 stages"),
    ("--parallel.dp 2 --parallel.pp 2 --parallel.schedule DualPipeV", "set virtual_stages to 2, not 1"),
    (
        "--parallel.pp 4 --parallel.schedule InterleavedZeroBubble --checkpointing",
        "splits the backward pass, so that checkpointing would compute every Transformer block more than twice"
        if SPLITS_BACKWARD
        else "splits the backward pass, which is tested on torch 2.13 and newer only",
    ),
    ("--parallel.dp 4 --compile", "compile works in a single process only; leave it out, or leave out parallel"),
]


@pytest.mark.parametrize(("flags", "words"), REFUSALS)
def test_what_cannot_work_is_refused_in_every_process(world, corpus_file, tmp_path, flags, words):
    arguments = ["train", "--data", corpus_file, "--out", tmp_path / "run", *FLAGS.split(), *flags.split()]
    for rank, (status, err) in enumerate(world(4).run(runs.command, [str(a) for a in arguments])):
        assert status == 2 and err.startswith(f"attnres train (rank {rank}): ") and words in err, err
        assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()


DISAGREEMENTS = [
    ("--optim.lr 0.01", "optim.lr is 0.003 in rank 0 and 0.01 in rank 2"),
    ("--seed 1 --steps 7", "steps is 6 in rank 0 and 7 in rank 2, seed is 0 in rank 0 and 1 in rank 2"),
    ("--context 8", "context is 16 in rank 0 and 8 in rank 2"),
    ("--residual.name prenorm", 'model.residual is "block_attnres" in rank 0 and "prenorm" in rank 2'),
    ("--parallel.dp 1 --parallel.tp 2", "parallel.dp is 2 in rank 0 and 1 in rank 2"),
    ("--data {other}", 'data.fingerprint is "'),
    ("--out {elsewhere}", "out is "),
    ("--precision bfloat16", 'precision is "float32" in rank 0 and "bfloat16" in rank 2'),
]


@pytest.mark.parametrize(("own", "words"), DISAGREEMENTS)
def test_processes_that_were_started_for_different_work_say_so(world, corpus_file, tmp_path, own, words):
    (tmp_path / "other.txt").write_text(corpus_file.read_text()[:-100])
    own = own.format(other=tmp_path / "other.txt", elsewhere=tmp_path / "elsewhere")
    split = ["--parallel.dp", "2", "--parallel.pp", "2", "--parallel.microbatches", "2", "--parallel.timeout", "10"]
    argv = ["train", "--data", str(corpus_file), "--out", str(tmp_path / "run"), *FLAGS.split(), *split]
    for status, err in world(4).run(runs.disagreeing, argv, own.split(), 2):
        assert status == 2 and "the processes of this job disagree: " in err and words in err, err
    assert not (tmp_path / "run").exists() and not (tmp_path / "elsewhere").exists()


def test_the_same_text_in_another_place_is_the_same(world, corpus_file, tmp_path):
    copy = tmp_path / "copy" / corpus_file.name
    copy.parent.mkdir()
    copy.write_text(corpus_file.read_text())
    argv = ["train", "--data", str(corpus_file), "--out", str(tmp_path / "run"), *FLAGS.split(), "--steps", "1"]
    argv += ["--parallel.dp", "4"]
    own = ["--data", str(copy), "--cache-dir", str(tmp_path / "cache")]
    assert [status for status, _ in world(4).run(runs.disagreeing, argv, own, 2)] == [0, 0, 0, 0]


def test_a_restart_that_only_another_node_has_counted_resumes(world, corpus_file, tmp_path):
    config = runs.settings(corpus_file, tmp_path / "run", {"dp": 2, "pp": 2, "microbatches": 2}, checkpoint_every=1)
    assert world(4).run(runs.run, config, False, (1, 2))[0][:2] == (False, 2)
    assert {kind for kind, _ in world(4).run(runs.failing, config)} == {"UsageError"}
    assert [end[:2] for end in world(4).run(runs.restarted, config, 3)] == [(True, 3)] * 4
    assert runs.curve(config.out)["step"] == [0, 1, 2, 2, 3, 3]


def test_a_start_gets_a_name_that_the_questions_of_the_dead_do_not_disturb():
    store, timeout = distributed.HashStore(), timedelta(seconds=20)
    store.set("attnres/asks/1", "of a dead process")
    store.set("attnres/asks/2", "of another")
    names: list[str] = []
    for _ in range(2):
        starts = [
            threading.Thread(target=lambda rank=rank: names.append(agreed_name(store, rank, 3, timeout)))
            for rank in range(3)
        ]
        for thread in starts:
            thread.start()
        for thread in starts:
            thread.join()
    first, second = names[:3], names[3:]
    assert len(set(first)) == len(set(second)) == 1 and len(set(names)) == 2
    with pytest.raises(distributed.DistStoreError, match=r"timed out waiting for the ranks \[1\]"):
        agreed_name(distributed.HashStore(), 0, 2, timedelta(seconds=0.1))
