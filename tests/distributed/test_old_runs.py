"""Runs that version 63f6752 saved, by one process and by four, still open and go on under any split."""

import json
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from attnres.cli import main
from attnres.errors import Failure
from attnres.parallel.config import ParallelConfig
from attnres.run.folder import read_config
from attnres.run.stored import Stored, verify

from . import runs

SAVED = Path(__file__).parents[1] / "data/saved_by_63f6752"
CORPUS = str(SAVED / "corpus.txt")
OLD = ["by_one_process", "by_four_processes"]
"""Stopped after step 3 of 6; their metrics.jsonl tells what the other three came to."""
ON_CPU = ["--device", "cpu"]
FOUR_PROCESSES = [
    {"shard": 2, "pp": 2, "microbatches": 2},
    {"dp": 2, "tp": 2},
]


@pytest.fixture
def old_run(request, tmp_path):
    return Path(shutil.copytree(SAVED / request.param, tmp_path / request.param))


def assert_same_curve(out: Path, expected: Path) -> None:
    ours, theirs = runs.curve(out), runs.curve(expected)
    assert ours["step"] == theirs["step"] == [0, 1, 2, 3, 3, 4, 5, 6, 6]
    for name in ("loss", "val_loss", "lr"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-3), name  # another processor rounds otherwise


@pytest.mark.parametrize("old_run", OLD, indirect=True)
def test_an_old_run_opens(old_run, capsys, tmp_path):
    before = sorted(old_run.rglob("*"))
    assert main(["generate", str(old_run), "--prompt", "Layer", "--tokens", "4", *ON_CPU]) == 0
    assert capsys.readouterr().out.startswith("Layer")
    data = ["--data", CORPUS, "--context", "16", "--out", str(tmp_path / "eval")]
    assert main(["eval", str(old_run / "checkpoints/step-00000003"), *data, *ON_CPU]) == 0
    measured = json.loads((tmp_path / "eval/results.json").read_text())
    assert measured["data"]["loss"] == pytest.approx(runs.curve(old_run)["val_loss"][1], rel=0.02)
    assert sorted(old_run.rglob("*")) == before


@pytest.mark.parametrize("old_run", OLD, indirect=True)
def test_an_old_run_goes_on_in_one_process(old_run):
    assert main(["train", "--resume", "--out", str(old_run), "--data", CORPUS, *ON_CPU]) == 0
    assert_same_curve(old_run, SAVED / old_run.name)


class Malicious:
    """Runs code where it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def test_a_table_of_contents_that_would_run_code_runs_none(tmp_path):
    checkpoint = Path(shutil.copytree(SAVED / "by_four_processes/checkpoints/step-00000003", tmp_path / "step"))
    manifest = verify(checkpoint)
    (checkpoint / ".metadata").write_bytes(pickle.dumps(Malicious(tmp_path / "it ran")))
    with pytest.raises(Failure, match=rf"^{checkpoint}/\.metadata is damaged: it names pathlib\S*\.touch"):
        Stored(checkpoint, manifest)
    assert not (tmp_path / "it ran").exists()


@pytest.mark.parametrize("split", FOUR_PROCESSES, ids=str)
@pytest.mark.parametrize("old_run", OLD, indirect=True)
def test_an_old_run_goes_on_in_four_processes(world, old_run, split):
    config = replace(read_config(old_run), out=old_run, data=CORPUS, parallel=ParallelConfig(**split, timeout=60))
    assert {end[:2] for end in world(4).run(runs.run, config, True)} == {(True, 6)}
    assert_same_curve(old_run, SAVED / old_run.name)
