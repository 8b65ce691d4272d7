"""Kimi Delta Attention in chunks against its recurrence and against softmax attention, by length.

    PYTHONPATH=src python benchmarks/kda.py          # minutes: 512 to 8192 tokens
    PYTHONPATH=src python benchmarks/kda.py --quick  # seconds, to see that it works

Attention alone, with q, k, v, decays and beta given: no projections, convolutions or norms. On a CPU in fp32, one
thread and its processor time, which other work on the machine does not lengthen much; on a GPU in bf16, wall time, and
with the kernels of flash-linear-attention where they are installed. Softmax attention is torch's, causal, with heads
of the same width. Medians over interleaved repeats.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timing
import torch
from torch import Tensor
from torch.nn import functional as F

from attnres.model.layers.delta_rule import FLA_INSTALLED, chunked, fused, recurrent
from attnres.run import hardware

GOAL = 1.3
PARTS = ("forward", "forward and backward")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=timing.RESULTS, help="folder of the results")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")
    parser.add_argument("--repeats", type=int, default=5, help="timed repeats of every variant")
    parser.add_argument("--quick", action="store_true", help="tiny shapes: does the script work?")
    arguments = parser.parse_args()
    device = hardware.find_device(arguments.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    heads, width = (2, 8) if arguments.quick else (4, 64)
    lengths = [16, 32, 64] if arguments.quick else [512, 1024, 2048, 4096, 8192]
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    about = timing.facts(
        device,
        dtype=str(dtype).removeprefix("torch."),
        repeats=arguments.repeats,
        clock="processor time, 1 thread" if device.type == "cpu" else "wall time",
        fla=timing.version("flash-linear-attention"),
    )
    rows: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
    for tokens in lengths:
        rows[str(tokens)] = measure(device, dtype, tokens, heads, width, arguments.repeats)
        print(f"{tokens} tokens", flush=True)
    short, long = str(lengths[1]), str(lengths[-1])
    growth = {
        name: {part: rows[long][name][part]["median"] / rows[short][name][part]["median"] for part in PARTS}
        for name in rows[long]
    }
    document = {
        **about,
        "shape": {"heads": heads, "width": width, "batch": 1, "chunk_size": 64},
        "goal": GOAL,
        "microseconds per token": rows,
        f"growth from {short} to {long}": growth,
    }
    lines = [
        "# Kimi Delta Attention by length",
        "",
        ", ".join(f"{key} {value}" for key, value in about.items()),
        "",
        f"{heads} heads of {width}, one sequence, chunks of 64. Microseconds per token, median (min to max).",
        "",
    ]
    names = list(rows[str(lengths[0])])
    for part in PARTS:
        table = [[tokens, *(cell(row[name][part]) for name in names)] for tokens, row in rows.items()]
        grown = [f"{growth[name][part]:.2f}" for name in names]
        table.append([f"{long} to {short}", *grown])
        lines += [f"## {part}", "", *timing.markdown_table(["tokens", *names], table)]
    lines.append(f"The goal for chunks is a time per token at {long} of at most {GOAL} times that at {short}.")
    timing.save(arguments.out, f"kda_{device.type}{'_quick' if arguments.quick else ''}", document, lines)


def cell(times: dict[str, float]) -> str:
    return f"{times['median']:.1f} ({times['min']:.1f} to {times['max']:.1f})"


def measure(
    device: torch.device, dtype: torch.dtype, tokens: int, heads: int, width: int, repeats: int
) -> dict[str, dict[str, dict[str, float]]]:
    """Microseconds per token by variant and part."""
    torch.manual_seed(0)
    q, k, v, g = torch.randn(4, 1, tokens, heads, width, device=device).unbind()
    beta = torch.rand(1, tokens, heads, device=device)
    given = [F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, -0.1 * g.sigmoid(), beta]
    inputs = [x.to(dtype).requires_grad_() for x in given]
    gradient = torch.randn(v.shape, device=device).to(dtype)

    def softmax(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> tuple[Tensor, None]:
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(*heads_first, is_causal=True).transpose(1, 2), None

    forms: dict[str, Callable[..., Any]] = {"chunks": chunked, "softmax": softmax, "recurrence": recurrent}
    if device.type == "cuda" and FLA_INSTALLED:
        forms["flash-linear-attention"] = fused

    def run(form: Callable[..., Any]) -> dict[str, float]:
        for x in inputs:
            x.grad = None

        def forward() -> None:
            with torch.no_grad():
                form(*inputs)

        def both() -> None:
            form(*inputs)[0].backward(gradient)

        return {
            part: 1e3 * milliseconds(call, device) / tokens for part, call in zip(PARTS, (forward, both), strict=True)
        }

    times = timing.interleave({name: lambda form=form: run(form) for name, form in forms.items()}, repeats, warmup=1)
    return {name: {part: timing.spread(values) for part, values in parts.items()} for name, parts in times.items()}


def milliseconds(call: Callable[[], None], device: torch.device) -> float:
    if device.type != "cpu":
        return timing.wall(call, device)
    began = time.process_time()
    call()
    return 1e3 * (time.process_time() - began)


if __name__ == "__main__":
    main()
