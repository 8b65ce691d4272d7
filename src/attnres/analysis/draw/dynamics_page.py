"""A page with a slider over a training: loss and magnitudes per block at each moment, without network or libraries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ... import files
from ...errors import Failure
from .dynamics_figure import LABELS, profiles
from .page import document
from .style import looks

BODY = """<main>
<h1>Training dynamics</h1>
<ul class="legend" id="legend"></ul>
<div class="time"><button id="play" type="button">Play</button>
<input id="at" type="range" min="0" value="0" aria-label="Moment of the training"><output id="step"></output></div>
<div id="charts"></div>
<noscript>This page draws with JavaScript; the same numbers stand in results.json.</noscript>
</main>"""


def write_page(results: dict[str, Any], path: Path) -> None:
    """Writes the page, means over seeds and their range in loss, to `path`. Raises Failure if it cannot be written."""
    try:
        files.write(path, document("dynamics", "Training dynamics", BODY, data=page_data(results)))
    except OSError as error:
        raise Failure(f"cannot write {path}: {error.strerror}; free some space and call again") from error


def page_data(results: dict[str, Any]) -> dict[str, Any]:
    """What the page shows: steps, blocks, and per residual connection its look, loss [P] with its range, and magnitudes
    [P, blocks]."""
    entries = []
    for name, look in looks(results).items():
        runs = [run for run in results["runs"] if run["residual"] == name]
        steps, _ = profiles(results, name, "output_magnitude")
        losses = [dict(zip(run["val_curve"]["step"], run["val_curve"]["val_loss"], strict=True)) for run in runs]
        entries.append(
            {
                "label": look.label,
                "colour": look.colour,
                "dark": look.dark,
                "loss": [sum(loss[step] for loss in losses) / len(losses) for step in steps],
                "lowest": [min(loss[step] for loss in losses) for step in steps],
                "highest": [max(loss[step] for loss in losses) for step in steps],
                **{profile: profiles(results, name, profile)[1].tolist() for profile in LABELS},
            }
        )
    return {
        "steps": steps,
        "blocks": len(entries[0]["output_magnitude"][0]),
        "labels": LABELS,
        "residuals": entries,
    }
