"""How often must depth be read? Forms of AttnRes that read in front of some layers only, against PreNorm.

    PYTHONPATH=src OMP_NUM_THREADS=1 python benchmarks/reads.py --out runs/reads            # the runs, hours
    PYTHONPATH=src python benchmarks/reads.py --out runs/reads --table                      # of what is finished
    PYTHONPATH=src OMP_NUM_THREADS=1 python benchmarks/reads.py --time                      # cost, on a quiet machine

What is asked and expected stands in docs/results.md. A finished run has a result.json in its folder and is not
repeated; one that was cut off, by a kill too, goes on from its last checkpoint. --table writes reads_cpu.json
and .md from the runs, and figures under --out, --time reads_cost_cpu.json and .md.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import reads_cost
import reads_figure
import reads_table
import timing
from reads_grid import Run, queue, train_and_look

from attnres.analysis.draw.figures import save
from attnres.errors import Failure, UsageError
from attnres.lab.grid import opened, run_grid
from attnres.run.config import TrainConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/reads"), help="folder of the runs")
    parser.add_argument("--jobs", type=int, default=2, help="runs at the same time, one thread each on two cores")
    parser.add_argument("--table", action="store_true", help="print the table of the runs that are finished")
    parser.add_argument("--time", action="store_true", help="measure what a step of every form costs, minutes")
    parser.add_argument("--widths", type=int, nargs="+", default=list(reads_cost.WIDTHS), help="of --time")
    parser.add_argument("--repeats", type=int, default=9, help="rounds of --time")
    parser.add_argument("--results", type=Path, default=timing.RESULTS, help="folder of the results")
    arguments = parser.parse_args()
    try:
        if arguments.time:
            reads_cost.measure(arguments.results, arguments.widths, arguments.repeats)
        elif arguments.table:
            table(arguments.out, arguments.results)
        else:
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


def table(out: Path, results: Path) -> None:
    """Prints and saves the table of what is finished, with the costs of the results folder if they are there."""
    found = reads_table.finished(out)
    if not found:
        raise UsageError(f"--out {out} has no finished run; start the runs first, without --table")
    costs = results / f"{reads_cost.NAME}.json"
    by_form = reads_cost.ratios(json.loads(costs.read_text())) if costs.exists() else {}
    losses = {run: result["val_loss"] for run, result in found.items()}
    lines = reads_table.page(losses, by_form)
    document = reads_table.document(found)
    timing.save(results, "reads_cpu", document, lines)
    if by_form:
        worths = reads_table.worths(losses)
        save(reads_figure.worth_figure(worths, reads_cost.by_width(results)), out / "figures", "reads_worth")
    for length in {entry["length"] for entry in document["inside"]}:
        save(reads_figure.inside_figure(document["inside"], length), out / "figures", f"reads_inside_x{length:g}")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
