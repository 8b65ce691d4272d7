"""Depth attention op by op, beside every rival that is installed, against the copy rate of the device.

    PYTHONPATH=src python benchmarks/ops.py                       # one process, under ten minutes
    PYTHONPATH=src python benchmarks/ops.py --quick --device cpu  # seconds, to see that it works

Whole residual paths, the two phases and single reads, forward and backward. Whatever is timed first has to agree with
the reference in fp64, outputs and all gradients; who does not, or cannot be imported, launched or tuned in time, is
listed with the reason. Medians over interleaved repeats of the device's own time (launching from Python is not in it;
benchmarks/training.py shows what is). The most important cases come first and results are saved after each.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import processes
import timing
import torch
from cases import Bench, Case, Variant, add_norm, phase_1, phase_2, read
from paths import residual_path

from attnres.bench import rivals
from attnres.run import hardware

ROUNDS_BEFORE_TIMING = 3


def copy_rate(device: torch.device, size: int) -> float:
    """Bytes per second, read and written, of copying `size` bytes."""
    source = torch.randn(size // 4, device=device)
    target, watch = torch.empty_like(source), timing.Stopwatch(device)
    times = timing.interleave({"copy": lambda: {"copy": watch(lambda: target.copy_(source))[1]}}, repeats=15)
    return 2 * size / (1e-3 * timing.spread(times["copy"]["copy"])["median"])


def measure(
    case: Case,
    bench: Bench,
    budget: timing.Budget,
    seconds_to_prepare: float,
    repeats: int,
    rehearse: Callable[[str], str | None] = lambda name: None,
) -> dict[str, Any]:
    """Rows by variant; a variant that cannot be prepared in time or is wrong goes to case.left_out.

    rehearse: called with a rival's name before it runs in this process; why it must not.
    """
    errors = {}
    for name, variant in list(case.variants.items()):
        variant.watches = {part: timing.Stopwatch(bench.device) for part in ("forward", "backward")}

        def prepare(name: str = name, variant: Variant = variant) -> None:
            for _ in range(ROUNDS_BEFORE_TIMING):
                variant.backward(variant.forward())
            if variant.truth is not None:
                errors[name] = variant.error()
                if errors[name] > case.tolerance:
                    raise RuntimeError(f"disagrees with the reference: relative error {errors[name]:.2g}")

        reason = rehearse(name) if rivals.package(name) else None  # a compiler cannot be stopped here
        reason = reason or timing.attempt(prepare, budget, seconds_to_prepare, bench.device)
        if reason:
            case.left_out[name] = reason
            del case.variants[name]
    times = timing.interleave({name: v.run for name, v in case.variants.items()}, repeats)
    return {
        name: {part: timing.spread(values) for part, values in parts.items()}
        | {"moved": case.variants[name].moved, "error": errors.get(name)}
        for name, parts in times.items()
    }


def rehearse(title: str, name: str, device: torch.device, dtype: torch.dtype, quick: bool) -> None:
    """Compiles and tunes one variant, in a process that can be ended: Triton then finds the kernels on the disk."""
    found, _ = rivals.load(device)
    with timing.parallel_autotuning():
        variant = cases(Bench(device, dtype, found, compiled=False), quick)[title]().variants[name]
        variant.backward(variant.forward())


def lines_of(title: str, result: dict[str, Any], rate: float) -> list[str]:
    rows = []
    both = {name: sum(row[part]["median"] for part in ("forward", "backward")) for name, row in result["rows"].items()}
    for name, row in result["rows"].items():
        cells = [name]
        for part, moved in zip(("forward", "backward"), row["moved"] or (None, None), strict=True):
            ms = row[part]["median"]
            cells += [f"{ms:.3g}", "-" if moved is None else f"{100 * moved / (1e-3 * ms) / rate:.0f} %"]
        ratio = f"{both[name] / both['attnres']:.2f}" if "attnres" in both else "-"
        error = "-" if row["error"] is None else f"{row['error']:.1e}"
        rows.append([*cells, f"{both[name]:.3g}", ratio, error])
    header = ["", "forward ms", "of copy rate", "backward ms", "of copy rate", "both ms", "to attnres", "error"]
    left_out = [f"- {name}: {reason}" for name, reason in result["left_out"].items()]
    return [f"## {title}", "", *timing.markdown_table(header, rows), *left_out, *([""] if left_out else [])]


def cases(bench: Bench, quick: bool) -> dict[str, Callable[[], Case]]:
    """The most important first. Forward of phase 1 at the last block of each shape, where it reads most."""
    two_forms = ["fla Triton", "flash-attn-res, one function", "flash-attn-res", "straightforward"]
    others = ["fla Gluon", "fast-attnres", "liger-kernel"]
    compiled = ["attnres, compiled", "prenorm, compiled", "straightforward, compiled"] if bench.compiled else []
    if quick:
        return {
            "path": lambda: residual_path(bench, 64, 32, 4, 2, [*two_forms, *compiled]),
            "phase 1": lambda: phase_1(bench, 64, 32, 2, 2),
            "phase 2": lambda: phase_2(bench, 64, 32),
            "read": lambda: read(bench, 64, 32, 3),
            "add": lambda: add_norm(bench, 64, 32),
        }
    if bench.device.type != "cuda":
        return {
            "read": lambda: read(bench, 2048, 512, 9),
            "path": lambda: residual_path(bench, 2048, 512, 24, 3, ["straightforward", *compiled[:2]]),
            "phase 1": lambda: phase_1(bench, 2048, 512, 8, 3),
            "phase 2": lambda: phase_2(bench, 2048, 512),
            "add": lambda: add_norm(bench, 2048, 512),
        }
    return {
        "path": lambda: residual_path(bench, 16384, 2048, 32, 8, two_forms),
        "phase 1": lambda: phase_1(bench, 16384, 2048, 4, 8),
        "phase 2": lambda: phase_2(bench, 16384, 2048),
        "add": lambda: add_norm(bench, 16384, 2048),
        "read": lambda: read(bench, 16384, 2048, 9),
        "phase 1, D=2304": lambda: phase_1(bench, 16384, 2304, 9, 6),
        "phase 2, D=2304": lambda: phase_2(bench, 16384, 2304),
        "phase 1, D=7168": lambda: phase_1(bench, 8192, 7168, 8, 24),
        "phase 2, D=7168": lambda: phase_2(bench, 8192, 7168),
        "path, others": lambda: residual_path(bench, 16384, 2048, 32, 8, others),
        "read, D=7168": lambda: read(bench, 8192, 7168, 9),
        "path, compiled": lambda: residual_path(bench, 16384, 2048, 32, 8, compiled),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=timing.RESULTS, help="folder of the results")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 on CUDA, else float32")
    parser.add_argument("--budget", type=float, default=540, help="seconds; what is not reached is left out")
    parser.add_argument("--prepare", type=float, default=120, help="seconds for one variant to compile and tune")
    parser.add_argument("--repeats", type=int, default=20, help="timed repeats of every variant")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, nothing compiled: does the script work?")
    parser.add_argument("--only", nargs="+", metavar="CASE", help="cases by name, e.g. path 'phase 1'")
    arguments = parser.parse_args()
    budget = timing.Budget(arguments.budget)
    device = hardware.find_device(arguments.device)
    dtype = getattr(torch, arguments.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    torch.manual_seed(0)
    found, missing = rivals.load(device)
    bench = Bench(device, dtype, found, compiled=not arguments.quick)

    rate = copy_rate(device, 2**20 if arguments.quick else 2**30 if device.type == "cuda" else 2**27)
    about = timing.facts(device, dtype=str(dtype), repeats=arguments.repeats, rivals=rivals.versions(found))
    about["copy rate, TB/s"] = round(rate / 1e12, 4)
    document: dict[str, Any] = {**about, "missing": missing, "cases": {}, "failed": {}, "not reached": []}
    lines = ["# Depth attention, op by op", "", ", ".join(f"{k} {v}" for k, v in about.items()), ""]
    lines += [f"- {name} left out: {reason}" for name, reason in missing.items()] + [""]
    name = f"ops_{device.type}{'_quick' if arguments.quick else ''}"
    with timing.parallel_autotuning(), processes.Worker() as worker:
        for title, build in cases(bench, arguments.quick).items():
            if arguments.only and title not in arguments.only:
                continue
            if budget.left() < 0:
                document["not reached"].append(title)
                continue
            try:
                case = build()

                def guard(name: str, title: str = title) -> str | None:
                    seconds = min(arguments.prepare, budget.left())
                    return worker.too_long(rehearse, title, name, device, dtype, arguments.quick, seconds=seconds)

                rows = measure(case, bench, budget, arguments.prepare, arguments.repeats, guard)
            except Exception as error:
                document["failed"][title] = timing.one_line(error)
                continue
            document["cases"][case.title] = result = {"rows": rows, "left_out": case.left_out}
            lines += lines_of(case.title, result, rate)
            print("\n".join(lines_of(case.title, result, rate)), flush=True)
            timing.save(arguments.out, name, document, lines)
            del case
            if device.type == "cuda":
                torch.cuda.empty_cache()
    lines += timing.gaps(document)
    timing.save(arguments.out, name, document, lines)


if __name__ == "__main__":
    main()
