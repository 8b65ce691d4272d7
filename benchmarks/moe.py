"""Forward and backward of a mixture of experts against a dense SwiGLU of equal activated size.

    PYTHONPATH=src python benchmarks/moe.py          # minutes: 8 of 64 experts, d=512, 2048 and 8192 tokens
    PYTHONPATH=src python benchmarks/moe.py --quick  # seconds, to see that it works

The dense layer's inner width is experts_per_token times an expert's; no shared experts. What is timed is the layer
with its router, sorting and gathering of rows, and all gradients, which are made anew as after zero_grad; no norm, no
optimizer. On a CPU with one thread processor time, which other work on the machine does not lengthen much, and with two
wall time; on a GPU wall time. Medians over interleaved repeats.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import timing
import torch
from torch import nn

from attnres.model.layers.experts import MixtureOfExperts
from attnres.model.layers.feed_forward import GatedMLP
from attnres.run import hardware

GOAL = 1.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=timing.RESULTS, help="folder of the results")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")
    parser.add_argument("--repeats", type=int, default=9, help="timed repeats of every variant")
    parser.add_argument("--quick", action="store_true", help="tiny shapes: does the script work?")
    arguments = parser.parse_args()
    device = hardware.find_device(arguments.device)
    width, experts, chosen = (16, 8, 2) if arguments.quick else (512, 64, 8)
    sizes = [(24, 32)] if arguments.quick else [(128, 2048), (256, 2048), (128, 8192)]
    about = timing.facts(device, dtype="float32 (autocast where named)", repeats=arguments.repeats)
    rows = []
    for threads in (1, 2) if device.type == "cpu" else (1,):
        torch.set_num_threads(threads)
        clock = "processor" if device.type == "cpu" and threads == 1 else "wall"
        for inner, tokens in sizes:
            for dtype in (torch.float32, torch.bfloat16):
                place = {"threads": threads, "clock": clock, "inner_width": inner, "tokens": tokens}
                found = measure(device, dtype, width, inner, tokens, experts, chosen, clock, arguments.repeats)
                rows.append({**place, **found})
                print(rows[-1], flush=True)
    shape = {"hidden_size": width, "num_experts": experts, "experts_per_token": chosen}
    document = {**about, "shape": shape, "goal": GOAL, "rows": rows}
    header = [
        "threads",
        "clock",
        "tokens",
        "inner width of an expert",
        "dtype",
        "experts ms (min to max)",
        "dense ms (min to max)",
        "ratio",
    ]
    table = [
        [
            *(str(row[name]) for name in ("threads", "clock", "tokens", "inner_width", "dtype")),
            *(f"{row[name]['median']:.0f} ({row[name]['min']:.0f} to {row[name]['max']:.0f})" for name in NAMES),
            f"{row['ratio']:.2f}",
        ]
        for row in rows
    ]
    lines = [
        "# Mixture of experts against a dense layer of equal activated size",
        "",
        ", ".join(f"{key} {value}" for key, value in about.items()),
        "",
        f"{chosen} of {experts} experts, d={width}; the goal is a ratio of at most {GOAL}.",
        "",
        *timing.markdown_table(header, table),
    ]
    timing.save(arguments.out, f"moe_{device.type}{'_quick' if arguments.quick else ''}", document, lines)


NAMES = ("experts", "dense")


def measure(
    device: torch.device,
    dtype: torch.dtype,
    width: int,
    inner: int,
    tokens: int,
    experts: int,
    chosen: int,
    clock: str,
    repeats: int,
) -> dict[str, object]:
    """Milliseconds of both layers, and the ratio of their medians."""
    torch.manual_seed(0)
    sizes = {"hidden_size": width, "intermediate_size": inner, "num_experts": experts, "experts_per_token": chosen}
    layers = (MixtureOfExperts(**sizes, num_shared_experts=0).to(device), GatedMLP(width, chosen * inner).to(device))
    x = torch.randn(1, tokens, width, device=device, requires_grad=True)
    gradient = torch.randn_like(x)

    def step(layer: nn.Module) -> dict[str, float]:
        def call() -> None:
            with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
                y = layer(x)
            y.backward(gradient.to(y.dtype))

        layer.zero_grad(set_to_none=True)
        x.grad = None
        if clock == "wall":
            return {"step": timing.wall(call, device)}
        began = time.process_time()
        call()
        return {"step": 1e3 * (time.process_time() - began)}

    variants = {name: lambda layer=layer: step(layer) for name, layer in zip(NAMES, layers, strict=True)}
    times = {name: timing.spread(parts["step"]) for name, parts in timing.interleave(variants, repeats).items()}
    ratio = times["experts"]["median"] / times["dense"]["median"]
    return {"dtype": str(dtype).removeprefix("torch."), **times, "ratio": ratio}


if __name__ == "__main__":
    main()
