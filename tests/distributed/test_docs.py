"""The command lines of docs/distributed.md, README and the Slurm script start."""

import re
import shlex
from pathlib import Path

import pytest

from attnres.commands import train as command
from attnres.train.loop import Result

ROOT = Path(__file__).parents[2]
TEXTS = [(ROOT / name).read_text().replace("\\\n", " ") for name in ("docs/distributed.md", "README.md")]
LINES = [line.partition(" # ")[0] for text in TEXTS for line in re.findall(r"^    (torchrun .*|sbatch .*)", text, re.M)]


@pytest.mark.parametrize("line", LINES)
def test_a_documented_split_fits_its_processes_and_its_model(line, monkeypatch):
    words = shlex.split(line)
    nodes, each = (
        int(words[words.index(flag) + 1]) if flag in words else 1
        for flag in (("--nodes", "--gpus-per-node") if "sbatch" in words else ("--nnodes", "--nproc-per-node"))
    )
    flags = words[words.index("train") + 1 :] if "train" in words else words[words.index("examples/slurm.sh") + 2 :]
    checked = []

    def train(config, resume):
        config.parallel.check(nodes * each, config.model, config.batch_size, config.context)
        checked.append(config.parallel.world_size)
        return Result(False, 0, 0, 0.0, 0.0, 0, None)

    monkeypatch.setattr(command, "train", train)
    assert command.run(flags) == 0
    assert checked == [nodes * each] and nodes * each > 1


def test_there_are_such_lines():
    assert len(LINES) >= 4
