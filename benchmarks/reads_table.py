"""The table of `reads.py`: what is finished, as differences to PreNorm of the same seed, and what they are worth."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from statistics import mean
from typing import Any

import timing
import torch
from reads_grid import BLOCKS_OF_LAYERS, FORMS, Run, queue

from attnres.analysis.measure.worth import worth

Losses = dict[Run, float]
LOOKED_INTO = (1, 3)
"""Lengths of the runs, of 12 Transformer blocks, of which the results keep what travels over depth."""


class _Unfinished(Exception):
    pass


def finished(out: Path) -> dict[Run, dict[str, Any]]:
    """The results of the runs that are finished."""
    found: dict[Run, dict[str, Any]] = {}

    def done(runs: Sequence[Run]) -> dict[Run, float]:
        for run in runs:
            file = run.cell(out).config.out / "result.json"
            if file.exists():
                found[run] = json.loads(file.read_text())
        if missing := [run for run in runs if run not in found]:
            raise _Unfinished(missing)
        return {run: found[run]["val_loss"] for run in runs}

    with suppress(_Unfinished):  # what comes after a learning rate that is not known yet
        for runs in queue(done):
            with suppress(_Unfinished):
                done(runs)
    return found


def document(results: dict[Run, dict[str, Any]]) -> dict[str, Any]:
    """What is kept: losses of every run, and what travels over depth as means over seeds."""
    kept = ("input_rms", "output_rms", "gradient_rms", "mixing")
    usual = (12, BLOCKS_OF_LAYERS[12], rates(results).get(12))
    seen: dict[tuple[str, float], list[dict[str, Any]]] = defaultdict(list)
    for run, result in results.items():
        if (run.blocks, run.num_blocks, run.rate) == usual and run.length in LOOKED_INTO:
            seen[run.form, run.length].append(result)
    inside = [
        {"form": form, "length": length}
        | {name: torch.tensor([one[name] for one in found]).double().mean(0).tolist() for name in kept}
        for (form, length), found in seen.items()
    ]
    for entry in inside:
        entry["mixing"] = [[round(weight, 3) for weight in row] for row in entry["mixing"]]
    runs = [
        {**vars(run), **{name: result[name] for name in ("val_loss", "val_curve", "parameters", "tokens")}}
        for run, result in results.items()
    ]
    return {**timing.facts(torch.device("cpu"), dtype="bfloat16 autocast"), "runs": runs, "inside": inside}


def rates(results: dict[Run, Any]) -> dict[int, float]:
    """The learning rate by the number of Transformer blocks, where it is chosen: what other forms trained with."""
    return {run.blocks: run.rate for run in results if run.form != "prenorm"}


def page(losses: Losses, costs: dict[str, float]) -> list[str]:
    """Markdown: the rates, then a table for each depth, N and length.

    costs: processor time of a step by form, as a multiple of PreNorm's.
    """
    lines = ["# How often depth is read", "", *rate_table(losses)]
    chosen = rates(losses)
    groups = {(run.blocks, run.num_blocks, run.length): run.rate for run in losses if run.form != "prenorm"}
    for (blocks, num_blocks, length), rate in groups.items():
        own = {run: loss for run, loss in losses.items() if run.blocks == blocks and run.rate == chosen[blocks]}
        rows = []
        for form in FORMS:
            row = of_form(own, form, num_blocks, length)
            if row is not None:
                rows.append(cells(form, row, of_form(own, "block", num_blocks, length), costs))
        lines += [f"## {blocks} Transformer blocks, N = {num_blocks}, {length:g} times the tokens, rate {rate:g}", ""]
        header = [
            "form",
            "seeds",
            "validation loss",
            "difference to PreNorm",
            "of Block's gain",
            "worth, of the tokens",
        ]
        lines += timing.markdown_table([*header, "cost", "worth / cost"], rows)
    return lines


def worths(losses: Losses) -> dict[str, dict[float, float]]:
    """What a form is worth by the length of its runs, of 12 Transformer blocks and the usual N."""
    blocks = 12
    own = {run: loss for run, loss in losses.items() if run.blocks == blocks and run.rate == rates(losses)[blocks]}
    found: dict[str, dict[float, float]] = {}
    for form in FORMS:
        rows = {length: of_form(own, form, BLOCKS_OF_LAYERS[blocks], length) for length in LOOKED_INTO}
        found[form] = {length: row["worth"] for length, row in rows.items() if row is not None}
    return found


def rate_table(losses: Losses) -> list[str]:
    tried: dict[tuple[int, float], list[float]] = defaultdict(list)
    for run, loss in losses.items():
        if run.form == "prenorm" and run.length == 1:
            tried[run.blocks, run.rate].append(loss)
    rows = [[blocks, f"{rate:g}", len(own), f"{mean(own):.4f}"] for (blocks, rate), own in sorted(tried.items())]
    return timing.markdown_table(["Transformer blocks", "learning rate", "seeds", "validation loss of PreNorm"], rows)


def of_form(losses: Losses, form: str, num_blocks: int, length: float) -> dict[str, Any] | None:
    """Losses of a form and differences to PreNorm of the same seed, and what these are worth; None without a pair."""
    base = {run.seed: loss for run, loss in losses.items() if (run.form, run.length) == ("prenorm", length)}
    own = {
        run.seed: loss
        for run, loss in losses.items()
        if (run.form, run.length) == (form, length) and (form == "prenorm" or run.num_blocks == num_blocks)
    }
    seeds = sorted(base.keys() & own.keys())
    if not seeds:
        return None
    differences = [own[seed] - base[seed] for seed in seeds]
    curve = decrements(losses, length)
    return {
        "losses": [own[seed] for seed in seeds],
        "difference": mean(differences),
        "differences": differences,
        "worth": worth(mean(differences), curve),
        "worths": [worth(difference, curve) for difference in differences],
    }


def decrements(losses: Losses, length: float) -> list[tuple[float, float]]:
    """(length / `length`, by how much PreNorm's loss there is lower than at `length`, a mean over the seeds of both),
    lengths ascending."""
    by_length: dict[float, Losses] = defaultdict(dict)
    for run, loss in losses.items():
        if run.form == "prenorm" and run.length >= length:
            by_length[run.length][run.seed] = loss
    base = by_length.pop(length, {})
    curve = [(1.0, 0.0)]
    for other, own in sorted(by_length.items()):
        if seeds := base.keys() & own.keys():
            curve.append((other / length, mean(own[seed] - base[seed] for seed in seeds)))
    return curve


def cells(form: str, row: dict[str, Any], block: dict[str, Any] | None, costs: dict[str, float]) -> list[str]:
    losses, differences, worths = row["losses"], row["differences"], row["worths"]
    found = [form, str(len(losses)), f"{mean(losses):.4f} ({min(losses):.4f} .. {max(losses):.4f})"]
    cost, told = costs.get(form), not math.isnan(row["worth"])
    if form == "prenorm":
        return [*found, "", "", "1", "1.00", "1.00"]
    share = f"{row['difference'] / block['difference']:.2f}" if block and block["difference"] < 0 else ""
    return [
        *found,
        f"{row['difference']:+.4f} ({min(differences):+.4f} .. {max(differences):+.4f})",
        share,
        f"{row['worth']:.2f} ({min(worths):.2f} .. {max(worths):.2f})" if told else "",
        f"{cost:.2f}" if cost else "",
        f"{row['worth'] / cost:.2f}" if cost and told else "",
    ]
