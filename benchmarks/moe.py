"""Forward and backward of a mixture of experts against a dense SwiGLU of equal activated size.

    PYTHONPATH=src python benchmarks/moe.py          # a minute: 8 of 64 experts, d=512, 2048 tokens
    PYTHONPATH=src python benchmarks/moe.py --quick  # seconds, to see that it works

The dense layer's inner width is experts_per_token times an expert's; no shared experts. What is timed is the layer
with its router, sorting and gathering of rows, and all gradients; no norm, no optimizer. On a CPU one thread and its
processor time, which other work on the machine does not lengthen much; on a GPU wall time. Medians over interleaved
repeats.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import timing
import torch
from torch import nn

from attnres.model.moe import MixtureOfExperts, SwiGLU
from attnres.train import hardware

GOAL = 1.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=timing.RESULTS, help="folder of the results")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")
    parser.add_argument("--repeats", type=int, default=9, help="timed repeats of every variant")
    parser.add_argument("--quick", action="store_true", help="tiny shapes: does the script work?")
    arguments = parser.parse_args()
    device = hardware.find_device(arguments.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    width, tokens, experts, chosen = (16, 32, 8, 2) if arguments.quick else (512, 2048, 64, 8)
    inner_widths = [24] if arguments.quick else [128, 256]
    clock = "processor time, 1 thread" if device.type == "cpu" else "wall time"
    about = timing.facts(device, dtype="float32 (autocast where named)", repeats=arguments.repeats, clock=clock)
    rows = []
    for inner in inner_widths:
        for dtype in (torch.float32, torch.bfloat16):
            rows.append(
                {"inner_width": inner, **measure(device, dtype, width, inner, tokens, experts, chosen, arguments)}
            )
            print(rows[-1], flush=True)
    shape = {"hidden_size": width, "tokens": tokens, "num_experts": experts, "experts_per_token": chosen}
    document = {**about, "shape": shape, "goal": GOAL, "rows": rows}
    header = ["inner width of an expert", "dtype", "experts ms (min to max)", "dense ms (min to max)", "ratio"]
    table = [
        [
            str(row["inner_width"]),
            row["dtype"],
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
        f"{chosen} of {experts} experts, d={width}, {tokens} tokens; the goal is a ratio of at most {GOAL}.",
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
    arguments: argparse.Namespace,
) -> dict[str, object]:
    """Milliseconds of both layers, and the ratio of their medians."""
    torch.manual_seed(0)
    sizes = {"hidden_size": width, "intermediate_size": inner, "num_experts": experts, "experts_per_token": chosen}
    layers = (MixtureOfExperts(**sizes, num_shared_experts=0).to(device), SwiGLU(width, chosen * inner).to(device))
    x = torch.randn(1, tokens, width, device=device, requires_grad=True)
    gradient = torch.randn_like(x)

    def step(layer: nn.Module) -> dict[str, float]:
        def call() -> None:
            with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
                y = layer(x)
            y.backward(gradient.to(y.dtype))

        layer.zero_grad(set_to_none=True)
        x.grad = None
        if device.type != "cpu":
            return {"step": timing.wall(call, device)}
        began = time.process_time()
        call()
        return {"step": 1e3 * (time.process_time() - began)}

    variants = {name: lambda layer=layer: step(layer) for name, layer in zip(NAMES, layers, strict=True)}
    times = {
        name: timing.spread(parts["step"]) for name, parts in timing.interleave(variants, arguments.repeats).items()
    }
    ratio = times["experts"]["median"] / times["dense"]["median"]
    return {"dtype": str(dtype).removeprefix("torch."), **times, "ratio": ratio}


if __name__ == "__main__":
    main()
