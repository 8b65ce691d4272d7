"""Whole training steps of a decoder: the standard residual, Block and Full AttnRes, every rival's op in the same net.

    PYTHONPATH=src python benchmarks/training.py                       # one process, under ten minutes
    PYTHONPATH=src python benchmarks/training.py --quick --device cpu  # seconds, to see that it works

A step is forward, loss and backward over all tokens, under autocast on fp32 weights; no optimizer, whose time is the
same for all. All variants of a shape share one set of weights but for their pseudo-queries and key norms. Tokens per
second and their ratio to prenorm of the same mode (eager, compiled, checkpointed) in the same group, medians over
interleaved repeats; peak memory as allocated on the GPU. A rival has to give the loss and the gradients of this
library's reads before it is timed. The most important rows come first and results are saved after each group.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import processes
import timing
import torch
from decoders import Nets, Row, Shape, observed, shape
from torch import Tensor

from attnres.bench import rivals
from attnres.run import hardware

TOLERANCE = {torch.bfloat16: 0.1, torch.float32: 1e-3}  # relative, of gradients through dozens of layers
PEERS = ("fla Triton", "flash-attn-res", "straightforward")
OTHER_PEERS = ("fla Gluon", "fast-attnres", "liger-kernel")

OURS = [Row(name) for name in ("prenorm", "block_attnres", "full_attnres")]
OURS_COMPILED = [Row(row.residual, compiled=True) for row in OURS]
CHECKPOINTED = [Row(row.residual, checkpointed=True) for row in OURS]


def against(residual: str, peers: tuple[str, ...], compiled: bool = False) -> list[Row]:
    """Prenorm, this library and every peer in one group."""
    return [Row(name, compiled=compiled) for name in ("prenorm", residual)] + [
        Row(residual, peer, compiled) for peer in peers
    ]


def measure(
    rows: list[Row],
    nets: Nets,
    steps: dict[Row, Callable[[], Tensor]],
    budget: timing.Budget,
    seconds_to_prepare: float,
    repeats: int,
    rehearse: Callable[[Row], str | None] = lambda row: None,
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Table rows of a group, and why others are not there. `steps` keeps what is ready for later groups.

    rehearse: called with a rival's row before it runs in this process; why it must not.
    """
    left_out, memory, errors = {}, {}, {}
    ready = []
    for row in rows:
        if row.op != "attnres" and row.op not in nets.found:
            continue

        def prepare(row: Row = row) -> None:
            if row not in steps:
                step = nets.step(row)
                step()
                if row.op != "attnres":
                    errors[row] = timing.disagreement(observed(step), nets.expected(row.residual))
                    if errors[row] > TOLERANCE[nets.dtype]:
                        raise RuntimeError(f"loss or gradients disagree: relative error {errors[row]:.2g}")
                steps[row] = step
            steps[row]()
            memory[row] = peak_memory(steps[row], nets.device)

        reason = rehearse(row) if row not in steps and rivals.package(row.op) else None
        reason = reason or timing.attempt(prepare, budget, seconds_to_prepare, nets.device)
        if reason:
            left_out[str(row)] = reason
            steps.pop(row, None)
        else:
            ready.append(row)
        nets.shared.zero_grad(set_to_none=True)
    timed = {str(row): lambda row=row: {"step": timing.wall(steps[row], nets.device)} for row in ready}
    times = timing.interleave(timed, repeats)
    table = []
    for row in ready:
        ms = timing.spread(times[str(row)]["step"])
        base = next((r for r in ready if r.residual == "prenorm" and r.mode == row.mode), None)
        table.append(
            {
                "residual": row.residual,
                "op": row.op if row.residual != "prenorm" else "add + norm",
                "mode": row.mode,
                "step_ms": ms,
                "tokens_per_second": nets.shape.tokens / (1e-3 * ms["median"]),
                "throughput_ratio": base and timing.spread(times[str(base)]["step"])["median"] / ms["median"],
                "peak_memory_bytes": memory[row],
                "memory_ratio": base and memory[row] and memory[row] / memory[base],
                "error": errors.get(row),
            }
        )
    return table, left_out


def rehearse(shape: Shape, row: Row, device: torch.device, dtype: torch.dtype) -> None:
    """Compiles and tunes a rival's kernels, in a process that can be ended: Triton then finds them on the disk."""
    with timing.parallel_autotuning():
        Nets(shape, device, dtype, rivals.load(device)[0]).step(row)()


def peak_memory(step: Callable[[], Tensor], device: torch.device) -> int | None:
    """Bytes at the fullest moment of a step, weights and gradients included. A CPU does not tell."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device)


def lines_of(title: str, table: list[dict[str, Any]], left_out: dict[str, str]) -> list[str]:
    def text(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    rows = [
        [
            r["residual"],
            r["op"],
            r["mode"],
            f"{r['step_ms']['median']:.1f} ({r['step_ms']['min']:.1f} to {r['step_ms']['max']:.1f})",
            f"{r['tokens_per_second']:,.0f}",
            text(r["throughput_ratio"], ".3f"),
            text(r["peak_memory_bytes"] and r["peak_memory_bytes"] / 2**30, ".2f"),
            text(r["memory_ratio"], ".3f"),
            text(r["error"], ".1e"),
        ]
        for r in table
    ]
    header = ["residual", "op", "mode", "step ms (min to max)", "tokens/s", "ratio", "peak GiB", "ratio", "error"]
    notes = [f"- {name}: {reason}" for name, reason in left_out.items()]
    return [f"## {title}", "", *timing.markdown_table(header, rows), *notes, *([""] if notes else [])]


def groups(device: torch.device, quick: bool) -> list[tuple[Shape, str, list[Row]]]:
    """The most important first."""
    if quick:
        tiny = shape("d=32, 2 blocks", 32, 2, 16, sequences=2, context=16)
        return [
            (tiny, "eager", OURS),
            (tiny, "checkpointed", CHECKPOINTED),
            (tiny, "Block, rivals", against("block_attnres", PEERS)),
        ]
    if device.type != "cuda":
        small = shape("d=512, 12 blocks", 512, 12, 64, sequences=8, context=256)
        return [
            (small, "eager", OURS),
            (small, "Block, rivals", against("block_attnres", PEERS)),
            (small, "compiled", OURS_COMPILED),
            (small, "Full, rivals", against("full_attnres", PEERS)),
            (small, "Block, rivals, compiled", against("block_attnres", PEERS, compiled=True)),
        ]
    wide = shape("d=2048, 16 blocks", 2048, 16, 128, sequences=8, context=2048)
    deep = shape("d=1024, 24 blocks", 1024, 24, 128, sequences=8, context=2048)
    return [
        (wide, "eager", OURS),
        (deep, "eager", OURS),
        (wide, "compiled", OURS_COMPILED),
        (wide, "Block, rivals", against("block_attnres", PEERS)),
        (wide, "checkpointed", CHECKPOINTED),
        (deep, "Block, rivals", against("block_attnres", PEERS)),
        (deep, "compiled", OURS_COMPILED),
        (wide, "Block, other rivals", against("block_attnres", OTHER_PEERS)),
        (wide, "Block, rivals, compiled", against("block_attnres", PEERS, compiled=True)),
        (wide, "Full, rivals", against("full_attnres", (PEERS[0], *PEERS[2:], *OTHER_PEERS))),
        (deep, "Block, other rivals", against("block_attnres", OTHER_PEERS)),
        (deep, "Full, rivals", against("full_attnres", (PEERS[0], *PEERS[2:], *OTHER_PEERS))),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=timing.RESULTS, help="folder of the results")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help="of autocast")
    parser.add_argument("--budget", type=float, default=540, help="seconds; what is not reached is left out")
    parser.add_argument("--prepare", type=float, default=150, help="seconds for one variant to compile and tune")
    parser.add_argument("--repeats", type=int, default=10, help="timed steps of every variant")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, nothing compiled: does the script work?")
    parser.add_argument("--only", nargs="+", metavar="GROUP", help="groups by a part of their titles")
    arguments = parser.parse_args()
    budget = timing.Budget(arguments.budget)
    device = hardware.find_device(arguments.device)
    dtype = hardware.find_precision(arguments.dtype, device)
    found, missing = rivals.load(device)
    about = timing.facts(
        device,
        dtype=str(dtype),
        repeats=arguments.repeats,
        rivals=rivals.versions(found),
    )
    document: dict[str, Any] = {**about, "missing": missing, "groups": {}, "failed": {}, "not reached": []}
    lines = ["# Training steps of a decoder", "", ", ".join(f"{k} {v}" for k, v in about.items()), ""]
    lines += [f"- {name} left out: {reason}" for name, reason in missing.items()] + [""]
    name = f"training_{device.type}{'_quick' if arguments.quick else ''}"
    nets: dict[str, Nets] = {}
    steps: dict[str, dict[Row, Callable[[], Tensor]]] = {}
    with timing.parallel_autotuning(), processes.Worker() as worker:
        for shape, group, rows in groups(device, arguments.quick):
            title = f"{shape.name}, {shape.tokens} tokens: {group}"
            if arguments.only and not any(word in title for word in arguments.only):
                continue
            if budget.left() < 0:
                document["not reached"].append(title)
                continue
            try:
                if shape.name not in nets:
                    nets[shape.name], steps[shape.name] = Nets(shape, device, dtype, found), {}

                def guard(row: Row, shape: Shape = shape) -> str | None:
                    if device.type == "cuda":
                        torch.cuda.empty_cache()  # the other process needs room
                    row = Row(row.residual, row.op)
                    seconds = min(arguments.prepare, budget.left())
                    return worker.too_long(rehearse, shape, row, device, dtype, seconds=seconds)

                table, left_out = measure(
                    rows, nets[shape.name], steps[shape.name], budget, arguments.prepare, arguments.repeats, guard
                )
            except Exception as error:
                document["failed"][title] = timing.one_line(error)
                continue
            document["groups"][title] = {"model": shape.config.to_dict(), "rows": table, "left_out": left_out}
            lines += lines_of(title, table, left_out)
            print("\n".join(lines_of(title, table, left_out)), flush=True)
            timing.save(arguments.out, name, document, lines)
    lines += timing.gaps(document)
    timing.save(arguments.out, name, document, lines)


if __name__ == "__main__":
    main()
