"""Training dynamics: loss, and output and gradient magnitude of every Transformer block, over a whole training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .. import json_text
from ..analysis.draw.dynamics_figure import dynamics_figure
from ..analysis.draw.dynamics_page import write_page
from ..analysis.draw.figures import save, write_figures
from ..analysis.measure.probe import probe
from ..files import read
from ..model import Decoder
from ..run import hardware
from ..run.config import TrainConfig
from .compare import CompareConfig
from .experiment import conducted
from .grid import write_json
from .worker import probe_batches, train_and_probe

PROFILES = ("output_magnitude", "gradient_magnitude")


def dynamics(config: CompareConfig, command: str = "") -> dict[str, Any]:
    """Trains every run and looks inside at each validation; writes results.json, figures/ and dynamics.html, a page
    with a slider over the training, under train.out.

    Calling again continues. Returns the contents of results.json, whose runs have under "dynamics" the steps [P] and
    magnitudes [P, Transformer blocks]. Raises UsageError for bad input before any run, Failure where runs fail or time
    is up.
    """
    out = config.train.out
    with conducted(config, command, measure=train_and_watch) as (config, found, head):
        results = {
            **head,
            "jobs": config.jobs,
            "model": config.runs()[0].model.to_dict(),
            "baseline": config.residuals[0],
            "runs": config.named(found),
        }
        write_json(out / "results.json", results)
        write_figures(results, out / "figures")
        for profile in PROFILES:
            save(dynamics_figure(results, profile), out / "figures", f"dynamics_{profile}")
        write_page(results, out / "dynamics.html")
    return results


def train_and_watch(config: TrainConfig) -> dict[str, Any]:
    """What `train_and_probe` returns, with what `probe` found at every validation under "dynamics"."""
    device = hardware.find_device(config.device)
    precision = hardware.find_precision(config.precision, device)
    batches = list(probe_batches(config))
    file = config.out / "dynamics.jsonl"

    def watch(model: Decoder, step: int) -> None:
        with hardware.autocast(device, precision):
            inside = probe(model, batches)
        record = {"step": step, **{name: inside[name] for name in PROFILES}}
        with file.open("a") as lines:
            lines.write(json.dumps(record) + "\n")

    result = train_and_probe(config, watch)
    return {**result, "dynamics": read_dynamics(file)}


def read_dynamics(file: Path) -> dict[str, list[Any]]:
    """The records of a run by step; of steps that a resumed run repeated the last is kept."""
    by_step: dict[int, dict[str, Any]] = {}
    for line in read(file).splitlines():
        try:
            record = json_text.parse_object(line)
        except ValueError:  # the run was killed while it wrote
            continue
        by_step[record["step"]] = record
    records = [by_step[step] for step in sorted(by_step)]
    return {name: [record[name] for record in records] for name in ("step", *PROFILES)}
