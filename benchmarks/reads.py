"""How often must depth be read? Forms of AttnRes that read in front of some layers only, against PreNorm.

    PYTHONPATH=src OMP_NUM_THREADS=1 python benchmarks/reads.py --out runs/reads            # the runs, hours
    PYTHONPATH=src python benchmarks/reads.py --out runs/reads --table                      # of what is finished

What is asked and expected stands in docs/results.md. A finished run has a result.json in its folder and is not
repeated; one that was cut off, by a kill too, goes on from its last checkpoint. --table also writes
benchmarks/results/reads_cpu.json from the runs, so that the table can be had without them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from reads_grid import Run, queue, train_and_look

from attnres.errors import Failure, UsageError
from attnres.lab.grid import opened, run_grid
from attnres.run.config import TrainConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/reads"), help="folder of the runs")
    parser.add_argument("--jobs", type=int, default=2, help="runs at the same time, one thread each on two cores")
    arguments = parser.parse_args()
    try:
        train_all(arguments.out, arguments.jobs)
    except (Failure, UsageError) as error:
        sys.exit(str(error))


def train_all(out: Path, jobs: int) -> None:
    """Every run of the queue that is not finished. Raises Failure where one fails, after the others of its lot."""
    with opened(TrainConfig(out=out)):

        def done(runs: Sequence[Run]) -> dict[Run, float]:
            found = run_grid([run.cell(out) for run in runs], jobs=jobs, keep_checkpoints=False, measure=train_and_look)
            return {run: result["val_loss"] for run, result in zip(runs, found, strict=True)}

        for runs in queue(done):
            done(runs)


if __name__ == "__main__":
    main()
