"""One HTML file that shows a comparison to somebody who has not seen depth attention before.

The file needs nothing else: no network, no other file, no framework. It is written from the results dictionary alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ... import files
from ...errors import Failure
from ..measure.worth import in_words
from .figures import attending, gradient_magnitude, loss_curves, output_magnitude, runs_of, weight_grid
from .page import document, variables
from .pictures import heat_colours, heat_key, heat_tables, inline_svg, sketch
from .style import Look, looks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DASH, MINUS, TIMES = "\N{EN DASH}", "\N{MINUS SIGN}", "\N{MULTIPLICATION SIGN}"

_MECHANISMS = {
    "plain": "The model as it was: each layer reads the plain sum of the embedding and every earlier output.",
    "prenorm": "The usual residual: each layer reads the plain sum of the embedding and every earlier output. "
    "All count the same, and the sum grows with depth.",
    "full_attnres": "Each layer chooses: a learned query attends over the embedding and every earlier output, "
    "and the layer reads their weighted mean.",
    "block_attnres": "Each layer chooses among the embedding and the sums of a few blocks of layers, "
    "so that memory and traffic stay close to those of the usual residual.",
}

_READING = {
    "loss": "Lower is better. Marked lines are the loss on held-out text, faint ones the training loss; "
    "the steep start runs out of the frame.",
    "longer": "The dashed line is the baseline in its longer run.",
    "difference": "The lower panel subtracts the baseline at the same point: below zero is a gain.",
    "output_magnitude": "How large the state is after each Transformer block. A line that keeps rising means that "
    "late layers must write ever larger outputs to be heard; one that stays bounded, or starts afresh at block borders,"
    " means that they need not.",
    "gradient_magnitude": "How strongly training pulls at each Transformer block's output. A flat line means that all "
    "depths learn at similar rates; a slope means that some blocks get most of the signal.",
    "depth_attention": "Each row is a layer that reads, each column something it can read; the weights of a row add "
    "up to 1. Along the diagonal a layer listens to its nearest predecessors. Strong colour in column <i>emb</i> means "
    "that the token embedding stays in reach at every depth; strong cells elsewhere are learned skips. A row of one "
    "colour is as at the start of training: a plain mean.",
}


def write_report(results: dict, out_dir: str | Path) -> Path:
    """Write the comparison as out_dir/report.html (self-contained, light and dark) and return its path.

    Args:
        results: the contents of a results.json of `attnres compare`; or of another command with runs of its form, whose
            "words" say "title", "command", "finding" and "note" in the place of what a comparison has.
        out_dir: folder, made if needed.

    Raises:
        UsageError: `results` holds no runs, or matplotlib is not installed.
        Failure: the file cannot be written.
    """
    named = looks(results)
    corpus = results.get("corpus") or {}
    words = results.get("words") or {}
    title = words.get("title") or "Attention Residuals, compared"
    finding = escape(words["finding"]) if "finding" in words else _finding(results, named)
    about = [words.get("command") or "attnres compare", corpus.get("name"), str(results.get("date") or "")[:10]]
    body = [
        "<main>",
        f'<header><p class="eyebrow">{" · ".join(escape(str(part)) for part in about if part)}</p>',
        f'<h1>{title}</h1><p class="lede">{finding}</p></header>',
        _mechanisms(named),
        f"<section><h2>Results</h2>{_summary(results, named)}{_caveat(results)}</section>",
        _curves(results, named),
        *(_attention(results, named) if attending(results) else []),
        f"<section><h2>The run</h2>{_facts(results)}{_every_run(results, named)}</section>",
        '<footer class="note">Attention Residuals: Kimi Team, arXiv 2603.15031. '
        f"Written by attnres {escape(str(results.get('version') or ''))}.</footer>\n</main>",
    ]
    path = Path(out_dir) / "report.html"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write(path, document("report", title, "\n".join(body), colours=_colours(named)))
    except OSError as error:
        raise Failure(f"cannot write the report to {out_dir}: {error.strerror or error}") from error
    return path


def _colours(named: dict[str, Look]) -> str:
    """var(--m0), var(--m1), ... for the mechanisms in order, class h0, h1, ... for cells of the heat levels."""
    light, dark = ({f"h{i}": colour for i, colour in enumerate(level)} for level in heat_colours())
    cells = "".join(f".{name} {{ background-color: var(--{name}) }}\n" for name in light)
    light |= {f"m{i}": look.colour for i, look in enumerate(named.values())}
    dark |= {f"m{i}": look.dark for i, look in enumerate(named.values())}
    return variables(light, dark) + cells


def _number(value: Any, form: str = ".3f", unit: str = "") -> str:
    """`value` formatted with a real minus sign; a dash where there is none or it is not finite."""
    if value is None or not math.isfinite(value):
        return DASH
    return f"{value:{form}}{unit}".replace("-", MINUS)


def _count(value: float | None) -> str:
    if value is None:
        return DASH
    scale, unit = next((pair for pair in ((1e9, " B"), (1e6, " M"), (1e3, " k")) if abs(value) >= pair[0]), (1, ""))
    return f"{value / scale:.3g}{unit}" if unit else f"{value:g}"


def _bytes(value: float | None) -> str:
    if value is None:
        return DASH
    return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"


def _plural(count: int, word: str) -> str:
    return f"{count} {word}{'' if count == 1 else 's'}"


def _rows(results: dict, named: dict[str, Look]) -> list[dict]:
    return [row for row in results.get("summary") or [] if row["residual"] in named]


def _verdict(results: dict, residual: str) -> str:
    """What the seeds say about this mechanism's difference to the baseline, taken seed by seed."""
    base = {run["seed"]: run["val_loss"] for run in runs_of(results, results.get("baseline", ""))}
    pairs = [(run["val_loss"], base[run["seed"]]) for run in runs_of(results, residual) if run["seed"] in base]
    values = [a - b for a, b in pairs if None not in (a, b) and math.isfinite(a - b)]
    if len(values) < 2:
        return "one seed" if values else ""
    within = abs(sum(values) / len(values)) <= max(values) - min(values)
    return "within the seed spread" if within else "beyond the seed spread"


def _finding(results: dict, named: dict[str, Look]) -> str:
    base = results.get("baseline")
    rows = {row["residual"]: row for row in _rows(results, named) if _number(row.get("val_loss")) != DASH}
    if not rows:
        return "No run reached a validation loss."
    best = min(rows.values(), key=lambda row: row["val_loss"])
    name, loss = escape(named[best["residual"]].label), _number(best["val_loss"])
    start = f'{name} reaches the lowest loss on held-out text, <span class="number">{loss}</span> nats per token'
    if best["residual"] == base or base not in rows:
        return f"{start}."
    plain = escape(named[str(base)].label)
    gap, verdict = _number(abs(best["val_loss"] - rows[base]["val_loss"])), _verdict(results, best["residual"])
    doubt = {"one seed": ": one seed each, so chance is not ruled out", "": ""}.get(verdict, f", {verdict}")
    speed, times = _number(best.get("throughput_ratio"), ".2f"), _times(results)
    cost = f' It trains at <span class="number">{speed}</span> times the speed' if speed != DASH else ""
    gain = (
        f"; {plain} needs {in_words(best.get('worth'), times)} times its tokens for that loss" if cost and times else ""
    )
    return f'{start}, <span class="number">{gap}</span> below {plain}{doubt}.{cost}{gain}{"." if cost else ""}'


def _times(results: dict) -> float | None:
    """How many times as long the longer run of the baseline was."""
    return (results.get("longer_baseline") or {}).get("times")


def _mechanisms(named: dict[str, Look]) -> str:
    items = [
        f"<li>{sketch(name, i)}<div><h3>{escape(look.label)}</h3><p>{_MECHANISMS[name]}</p></div></li>"
        for i, (name, look) in enumerate(named.items())
        if name in _MECHANISMS
    ]
    return f'<ul class="mechanisms">{"".join(items)}</ul>' if items else ""


def _table(head: list[str], rows: list[list[str]]) -> str:
    """Cells are HTML. Roles are spelled out because the narrow layout changes `display`, which would drop them."""
    top = "".join(f'<th role="columnheader" scope="col">{cell}</th>' for cell in head)
    body = "".join(
        f'<tr role="row"><th role="rowheader" scope="row">{row[0]}</th>'
        + "".join(f'<td role="cell" data-label="{h}">{cell}</td>' for h, cell in zip(head[1:], row[1:], strict=True))
        + "</tr>"
        for row in rows
    )
    return (
        f'<table class="results" role="table"><thead role="rowgroup"><tr role="row">{top}</tr></thead>'
        f'<tbody role="rowgroup">{body}</tbody></table>'
    )


def _name(named: dict[str, Look], residual: str) -> str:
    index = list(named).index(residual)
    return f'<span class="chip" style="color: var(--m{index})"></span>{escape(named[residual].label)}'


def _summary(results: dict, named: dict[str, Look]) -> str:
    base = results.get("baseline")
    losses = [row["val_loss"] for row in _rows(results, named) if _number(row.get("val_loss")) != DASH]
    times, rows = _times(results), []
    for row in _rows(results, named):
        error = row.get("standard_error")  # where it is known, losses have the digits that it is told in
        loss = _number(row.get("val_loss"), ".3f" if error is None else ".4f")
        if losses and row.get("val_loss") == min(losses):
            loss = f'<span class="best">{loss}</span>'
        if row.get("val_loss_spread") is not None:
            loss += f"<small>spread {_number(row['val_loss_spread'])}</small>"
        is_base = row["residual"] == base
        difference = "baseline" if is_base else _number(row.get("difference"), "+.3f" if error is None else "+.4f")
        if not is_base and difference != DASH:
            doubt = _verdict(results, row["residual"]) if error is None else f"\N{PLUS-MINUS SIGN} {error:.4f}"
            difference += f"<small>{doubt}</small>"
        worth = [in_words(row.get("worth"), times) + TIMES] if times else []
        rows.append([
            _name(named, row["residual"]), loss, difference, *worth, _number(row.get("throughput_ratio"), ".2f", TIMES),
            _bytes(row.get("peak_memory_bytes")), _count(row.get("parameters")), _count(row.get("tokens")),
        ])  # fmt: skip
    gained = ["Worth, of the baseline's tokens"] if times else []
    head = ["Residual connection", "Validation loss, nats/token", "Difference to the baseline", *gained,
            "Tokens/s, relative", "Peak memory", "Parameters", "Training tokens"]  # fmt: skip
    return _table(head, rows)


def _caveat(results: dict) -> str:
    if note := (results.get("words") or {}).get("note"):
        return f'<p class="note">{escape(note)}</p>'
    seeds = len({run["seed"] for run in results["runs"]})
    parameters = max((run.get("parameters") or 0 for run in results["runs"]), default=0)
    tokens = max((run.get("tokens") or 0 for run in results["runs"]), default=0)
    text = ""
    if parameters < 1e8 or tokens < 1e9:
        text = (
            f"This is a very small experiment: {_count(parameters)} parameters and {_count(tokens)} training tokens a "
            "run. It shows how the mechanisms behave; it does not predict what they gain at the scale of a real model. "
        )
    if seeds == 1:
        text += "There is one seed only: how much of a difference is chance cannot be told; repeat it with more seeds."
    else:
        text += (
            f"Differences are taken seed by seed over {seeds} seeds; one that is no larger than the range of those "
            "differences is called <i>within the seed spread</i>, and should be read as no difference."
        )
    if times := _times(results):
        text += (
            " <i>Worth</i> is how many times its tokens the baseline needs for the same loss, by one more run of it on "
            f"{times:g} times as many."
        )
    return f'<p class="note">{text}</p>'


def _figure(figure: Figure, name: str, named: dict[str, Look], reading: str, css: str = "") -> str:
    title = name.replace("_", " ").capitalize()
    label = f"{title}, one line each for {', '.join(look.label for look in named.values())}"
    svg = inline_svg(figure, name.replace("_", ""), label, named)
    return f'<figure class="{css}">{svg}<figcaption><b>{title}.</b> {reading}</figcaption></figure>'


def _curves(results: dict, named: dict[str, Look]) -> str:
    reading = [_READING["loss"], *[_READING["longer"]] * bool(_times(results))]
    if results.get("baseline") in named and len(named) > 1:
        reading.append(_READING["difference"])
    if len({run["seed"] for run in results["runs"]}) > 1:
        reading.append("Here and below, lines are means over the seeds and bands run from the lowest to the highest.")
    loss = _figure(loss_curves(results), "loss", named, " ".join(reading), "beside")
    profiles: dict[str, Callable[[dict], Figure]] = {
        "output_magnitude": output_magnitude,
        "gradient_magnitude": gradient_magnitude,
    }
    pair = [
        _figure(draw(results), name, named, _READING[name])
        for name, draw in profiles.items()
        if any(run.get(name) for run in results["runs"])
    ]
    depth = f'<section><h2>The signal over depth</h2><div class="pair">{"".join(pair)}</div></section>' if pair else ""
    return f"<section><h2>Learning</h2>{loss}</section>{depth}"


def _attention(results: dict, named: dict[str, Look]) -> list[str]:
    parts = ["<section><h2>Where each layer looks</h2>", f'<p class="note">{_READING["depth_attention"]}</p>']
    for name in attending(results):
        grid, partial = weight_grid(results, name)
        kind = "layer" if grid.shape[1] == len(grid) else "block"
        parts.append(
            f'<figure class="heat" data-kind="{kind}"><h3>{_name(named, name)}</h3>{heat_tables(grid, partial)}'
            f'<div class="key">{heat_key(bool(partial.any()))}'
            "<output>Point at a cell, or use the arrow keys, for its weight.</output></div>"
            f"<figcaption>Rows: reading layers, and the output. Columns: the embedding (<i>emb</i>), then {kind} by "
            f"{kind}. Mean weight over tokens and seeds; the colour follows its square root.</figcaption></figure>"
        )
    return [*parts, "</section>"]


def _settings(values: dict, prefix: str = "") -> list[str]:
    """ "name value" of every setting that has a value; nested ones under dotted names."""
    settings = []
    for key, value in values.items():
        if isinstance(value, dict):
            settings += _settings(value, f"{prefix}{key}.")
        elif value is not None:
            settings.append(f"{prefix}{key} {value}")
    return settings


def _facts(results: dict) -> str:
    corpus, model = results.get("corpus") or {}, results.get("model") or {}
    words = {"num_hidden_layers": "Transformer blocks", "hidden_size": "wide", "num_attention_heads": "heads",
             "vocab_size": "tokens in the vocabulary"}  # fmt: skip
    shape = [f"{model[key]} {word}" for key, word in words.items() if key in model]
    facts = {
        "Command": results.get("command"),
        "Corpus": corpus.get("name") and f"{corpus['name']}: {_count(corpus.get('train_tokens'))} tokens to train on, "
        f"{_count(corpus.get('val_tokens'))} held out",
        "Model": ", ".join(shape),
        "Training": ", ".join(_settings(results.get("train") or {})),
        "Seeds": ", ".join(str(seed) for seed in sorted({run["seed"] for run in results["runs"]})),
        "Device": f"{results.get('device') or DASH}, {results.get('dtype') or DASH}",
        "Versions": ", ".join(f"{key} {results[field]}" for key, field in
                              (("attnres", "version"), ("torch", "torch"), ("Python", "python")) if results.get(field)),
        "Commit": results.get("commit"),
        "Date": results.get("date"),
    }  # fmt: skip
    rows = [(key, escape(str(value))) for key, value in facts.items() if value]
    items = [f"<dt>{k}</dt><dd>{f'<code>{v}</code>' if k in ('Command', 'Commit') else v}</dd>" for k, v in rows]
    return f'<dl class="facts">{"".join(items)}</dl>'


def _every_run(results: dict, named: dict[str, Look]) -> str:
    rows = [
        [_name(named, run["residual"]), str(run["seed"]), _number(run.get("val_loss"), ".4f"),
         _number(run.get("tokens_per_second"), ",.0f"), _bytes(run.get("peak_memory_bytes"))]
        for run in results["runs"]
    ]  # fmt: skip
    head = ["Residual connection", "Seed", "Validation loss, nats/token", "Tokens/s", "Peak memory"]
    return f"<details><summary>Every run ({_plural(len(rows), 'run')})</summary>{_table(head, rows)}</details>"
