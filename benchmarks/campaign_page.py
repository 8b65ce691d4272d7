"""The page of benchmarks/campaign.py: what is aimed at, and a table a stage."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import timing

Value = dict[str, Any]


def lines(document: dict[str, Any]) -> list[str]:
    page = ["# One GPU, measured", ""]
    for i, call in enumerate(document["calls"]):
        rate = f"copy rate {call['copy rate'] / 1e12:.3g} TB/s"
        facts = [f"{k} {v}" for k, v in call.items() if k not in ("copy rate", "rivals")]
        page += [f"Call {i}: " + ", ".join([rate, *facts]), ""]
    page += aims(document)
    for stage, answers in document["results"].items():
        page += section(stage, answers, document)
    if document.get("left"):
        page += ["## Left for another call", ""]
        page += [
            f"- {stage}: {'; '.join(names[:8])}{' ...' * (len(names) > 8)}" for stage, names in document["left"].items()
        ]
    return [*page, ""]


def section(stage: str, answers: dict[str, Any], document: dict[str, Any]) -> list[str]:
    found = {name: a for name, a in answers.items() if "value" in a}
    failed = [f"- {name}: {a['failed']}" for name, a in answers.items() if "failed" in a]
    page = [f"## {stage}", ""]
    if stage == "correctness":
        worst: dict[str, tuple[float, str]] = {}
        for name, a in found.items():
            dtype = name.split()[-1]
            worst[dtype] = max(worst.get(dtype, (0.0, "")), (a["value"]["error"], name))
        page += [f"{len(found)} right, {len(failed)} not. Largest relative error:", ""]
        page += timing.markdown_table(["dtype", "error", "of"], [[d, f"{e:.1e}", n] for d, (e, n) in worst.items()])
    elif found:
        kinds: dict[tuple[str, ...], list[list[str]]] = {}
        for name, a in found.items():
            header, more = table(name, a["value"], document["calls"][a["call"]]["copy rate"])
            kinds.setdefault(tuple(header), []).extend(more)
        for head, body in kinds.items():
            page += timing.markdown_table(head, body)
        for name, a in found.items():
            failed += [f"- {name}: {row}: {reason}" for row, reason in a["value"].get("left out", {}).items()]
    return [*page, *failed, *([""] if failed else [])]


def table(name: str, value: Value, rate: float) -> tuple[list[str], list[list[str]]]:
    """Header and rows of one answer, by what it holds."""
    if "us" in value:
        us, moved = value["us"], value["moved"]
        cells = [name, spread(us), percent(moved, 1e-3 * us["median"], rate), str(value["sets"])]
        return ["", "us", "of copy rate", "input sets"], [cells]
    if "forward" in value:
        return ["", "forward us", "of copy rate", "backward us", "of copy rate"], [
            [name, *times(value, value["moved"], rate)]
        ]
    if isinstance(value.get("rows"), list):
        header = ["", "step ms", "tokens/s", "throughput to prenorm", "peak GiB", "to prenorm", "error"]
        return header, [[f"{name}: {row['row']}", *step(row)] for row in value["rows"]]
    if "rows" in value:
        header = ["", "forward us", "of copy rate", "backward us", "of copy rate", "both ms"]
        body = []
        for row, parts in value["rows"].items():
            moved = value.get("moved", {}).get(row) or parts.get("moved")
            both = parts["forward"]["median"] + parts["backward"]["median"]
            body.append([f"{name}: {row}", *times(parts, moved, rate), f"{both:.3g}"])
        return header, body
    if "val_curve" in value:
        if value.get("unfinished"):
            last = (value["val_curve"]["val_loss"] or [float("nan")])[-1]
            return ["", "validation loss", "tokens/s", "peak GiB"], [
                [name, f"{last:.4f} (at step {value['step']})", "-", "-"]
            ]
        cells = [
            name,
            f"{value['val_loss']:.4f}",
            f"{value['tokens_per_second']:,.0f}",
            gib(value["peak_memory_bytes"]),
        ]
        return ["", "validation loss", "tokens/s", "peak GiB"], [cells]
    rows = [[f"{name}: {title}", spread(v), f"{v['ratio']:.3f}"] for title, v in value.items()]
    return ["", "ms", "to standard"], rows


def times(parts: Value, moved: Any, rate: float) -> list[str]:
    cells = []
    for part, bytes_ in zip(("forward", "backward"), moved or (None, None), strict=True):
        ms = parts[part]["median"]
        cells += [f"{1e3 * ms:.4g}", percent(bytes_, ms, rate)]
    return cells


def step(row: Value) -> list[str]:
    ratio = "-" if row["throughput_ratio"] is None else f"{row['throughput_ratio']:.3f}"
    memory = "-" if row["memory_ratio"] is None else f"{row['memory_ratio']:.3f}"
    error = "-" if row["error"] is None else f"{row['error']:.1e}"
    return [
        spread(row["step_ms"]),
        f"{row['tokens_per_second']:,.0f}",
        ratio,
        gib(row["peak_memory_bytes"]),
        memory,
        error,
    ]


def spread(values: Value) -> str:
    return f"{values['median']:.4g} ({values['min']:.4g} to {values['max']:.4g})"


def percent(moved: float | None, ms: float, rate: float) -> str:
    return "-" if moved is None else f"{share(moved, ms, rate):.0f} %"


def share(moved: float, ms: float, rate: float) -> float:
    return 100 * moved / (1e-3 * ms) / rate


def gib(count: float | None) -> str:
    return "-" if count is None else f"{count / 2**30:.2f}"


# Aims


def aims(document: dict[str, Any]) -> list[str]:
    """What is aimed at beside what was found, for the questions that have been answered."""

    def op(stage: str, name: str, part: str) -> str:
        value, rate = get(document, stage, name)
        at = ("forward", "backward").index(part)
        return f"{share(value['moved'][at], value[part]['median'], rate):.0f} %"

    def path() -> str:
        row = get(document, "ops", "path, Block, L=32 S=8 D=2048 T=16384")[0]["rows"]["attnres"]
        return f"{row['forward']['median'] + row['backward']['median']:.2f} ms"

    def read(n: int, tokens: int) -> str:
        return (
            f"{get(document, 'published shapes', f'read, no norm, n={n} D=7168 T={tokens}')[0]['us']['median']:.1f} us"
        )

    def trained(mode: str, shape: str, residual: str) -> str:
        answers = document["results"][f"training, {mode}"]
        value = next(a["value"] for name, a in answers.items() if name.startswith(shape))
        row = next(row for row in value["rows"] if row["residual"] == residual)
        memory = "" if row["memory_ratio"] is None else f" (memory {row['memory_ratio']:.2f})"
        return f"{row['throughput_ratio']:.3f}{memory}"

    def decoded(title: str) -> str:
        return "; ".join(f"{get(document, 'decode', f'batch {b}')[0][title]['ratio']:.3f}" for b in (1, 64))

    k3, nine = "phase 1, n=8 S=24 D=7168 T=8192", "read, n=9 D=2048 T=16384"
    table: list[tuple[str, str, Callable[[], str]]] = [
        ("residual path, T=16384 D=2048 L=32 S=8", "10.5 ms", path),
        ("read backward, chained, D=2048 n=9, of the copy rate", "80 %", lambda: op("ops", nine, "backward")),
        ("phase 1 forward, D=7168 n=8 S=24", "75 %", lambda: op("ops, other widths", k3, "forward")),
        ("phase 1 backward, the same", "65 %", lambda: op("ops, other widths", k3, "backward")),
        ("read forward, D=7168, 5 sources, 1024 tokens", "30.4 us", lambda: read(5, 1024)),
        ("read forward, D=7168, 9 sources, 8192 tokens", "398 us", lambda: read(9, 8192)),
        ("step compiled, Block, d=2048", "0.97", lambda: trained("compiled", "d=2048", "block_attnres")),
        ("step compiled, Block, d=1024", "0.95", lambda: trained("compiled", "d=1024", "block_attnres")),
        ("step compiled, Block, d=512", "0.93", lambda: trained("compiled", "d=512", "block_attnres")),
        ("step compiled, Full, d=2048", "0.90 (memory 1.1)", lambda: trained("compiled", "d=2048", "full_attnres")),
        ("step eager, Block, d=1024", "0.93", lambda: trained("eager", "d=1024", "block_attnres")),
        ("step checkpointed, Block, d=2048", "0.95", lambda: trained("checkpointed", "d=2048", "block_attnres")),
        ("decode in a graph, batch 1; 64, Block", "1.02", lambda: decoded("Block")),
        ("decode in a graph, batch 1; 64, Full", "1.05", lambda: decoded("Full")),
    ]
    rows = []
    for what, aim, measured in table:
        try:
            rows.append([what, aim, measured()])
        except (KeyError, StopIteration):  # not asked yet, or failed
            continue
    return ["## Aims", "", *timing.markdown_table(["", "aim", "measured"], rows)] if rows else []


def get(document: dict[str, Any], stage: str, name: str) -> tuple[Any, float]:
    answer = document["results"][stage][name]
    return answer["value"], document["calls"][answer["call"]]["copy rate"]
