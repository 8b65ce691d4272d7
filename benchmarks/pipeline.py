"""What AttnRes costs in a pipeline: step time, memory and bytes on 4 processes, beside the same stack with plain sums.

    PYTHONPATH=src python benchmarks/pipeline.py [--width 512] [--blocks 8] [--repeats 5] [--device cpu|cuda]

One run, every variant in it, a round of all variants after the other; medians and ratios to the standard residual of
the same run. Beside the time on the clock stands the processor time of all ranks together: where processes share cores,
as on a small machine, the clock measures how they take turns. Variants: prenorm; Block and Full AttnRes with the
cross-stage cache and without. "One process" is the same step without a pipeline, in the first process alone: what the
mechanism itself costs there. Memory is what a step adds at its peak to a process's resident memory (on a GPU: to its
allocated memory), the largest of the ranks; bytes are counted on real sends. On a GPU machine each process takes a GPU
of its own.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import socket
import time
from contextlib import closing
from pathlib import Path
from statistics import median
from typing import Any

import timing
import torch
from torch import Tensor, distributed, multiprocessing
from torch.nn import functional as F

from attnres.model import Decoder, DecoderConfig
from attnres.parallel import mesh as meshes
from attnres.parallel.build import build_parts
from attnres.parallel.config import ParallelConfig
from attnres.parallel.pipeline import Layout, Pipeline
from attnres.run import hardware

PROCESSES, STAGES, MICROBATCHES = 4, 2, 8
SCHEDULE = "Interleaved1F1B"
VARIANTS = {
    "prenorm": ("prenorm", "on"),
    "block_attnres, cache on": ("block_attnres", "on"),
    "block_attnres, cache off": ("block_attnres", "off"),
    "full_attnres, cache on": ("full_attnres", "on"),
    "full_attnres, cache off": ("full_attnres", "off"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=timing.RESULTS, help="folder of the results")
    parser.add_argument("--width", type=int, default=512, help="of the residual stream")
    parser.add_argument("--blocks", type=int, default=8, help="Transformer blocks; each is one block of Block AttnRes")
    parser.add_argument("--context", type=int, default=256, help="tokens of a micro-batch, one sequence")
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")
    arguments = parser.parse_args()
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(PROCESSES)}
    multiprocessing.spawn(work, (arguments,), nprocs=PROCESSES)


def work(rank: int, arguments: argparse.Namespace) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    device = hardware.find_device(arguments.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    lines = {name: line(name, arguments, device) for name in VARIANTS}
    times: dict[str, list[float]] = {name: [] for name in lines}
    busy: dict[str, list[float]] = {name: [] for name in lines}
    peaks: dict[str, int] = {}
    for repeat in range(arguments.repeats + 1):
        for name, pipeline in lines.items():
            seconds, processor, peak = step(pipeline, arguments, device)
            if repeat:
                times[name].append(1e3 * seconds)
                busy[name].append(1e3 * processor)
                peaks[name] = max(peaks.get(name, 0), peak)
            sent = pipeline.sent_bytes()
            pipeline.bytes = sum(count for way in sent.values() for count in way.values())
    alone = {name: whole(name, arguments, device) if rank == 0 else {} for name in ("prenorm", "block_attnres")}
    distributed.barrier()
    own = {
        name: {
            "peak": peaks[name],
            "sent": pipeline.bytes,
            "stored": pipeline.store.peak * arguments.context * arguments.width * pipeline.layout_bytes,
        }
        for name, pipeline in lines.items()
    }
    gathered: list[Any] = [None] * PROCESSES
    distributed.all_gather_object(gathered, own)
    if rank == 0:
        report(arguments, device, times, busy, gathered, alone)
    distributed.destroy_process_group()


def shape(residual: str, arguments: argparse.Namespace) -> DecoderConfig:
    options = {"num_blocks": arguments.blocks} if residual == "block_attnres" else {}
    return DecoderConfig(
        hidden_size=arguments.width,
        num_hidden_layers=arguments.blocks,
        num_attention_heads=arguments.width // 64,
        residual=residual,
        residual_options=options,
    )


def precision(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def line(name: str, arguments: argparse.Namespace, device: torch.device) -> Any:
    """The pipeline of a variant."""
    residual, cache = VARIANTS[name]
    parallel = ParallelConfig(
        pp=PROCESSES, virtual_stages=STAGES, schedule=SCHEDULE, microbatches=MICROBATCHES, pipeline_cache=cache
    )
    mesh = meshes.build(parallel, device)
    config = shape(residual, arguments)
    layout = Layout(config, parallel, (1, arguments.context, arguments.width), precision(device))
    parts = build_parts(config, layout, mesh, device, arguments.context, 0)
    for part in parts:
        part.precision = precision(device)
    pipeline: Any = Pipeline(parts, layout, parallel, mesh, device, MICROBATCHES, arguments.context, loss)
    pipeline.layout_bytes = next(iter(layout.like.values())).element_size()
    return pipeline


def loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum")


def tokens(arguments: argparse.Namespace, device: torch.device) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    ids = torch.randint(257, (MICROBATCHES, arguments.context + 1), device=device)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def step(pipeline: Pipeline, arguments: argparse.Namespace, device: torch.device) -> tuple[float, float, int]:
    """Seconds of a step of all processes, seconds of processor time of all, bytes that it added at this one's peak."""
    inputs, targets = tokens(arguments, device)
    for part in pipeline.parts:
        part.zero_grad()
    before = reset_peak(device)
    hardware.synchronize(device)
    distributed.barrier()
    began, processor = time.perf_counter(), time.process_time()
    pipeline.train(inputs, targets)
    hardware.synchronize(device)
    total = torch.tensor(time.process_time() - processor, device=device)
    distributed.barrier()
    seconds = time.perf_counter() - began
    distributed.all_reduce(total)
    return seconds, total.item(), hardware.peak_memory(device) - before


def reset_peak(device: torch.device) -> int:
    """Bytes in use now; from here on the peak counts anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what is free would be taken again unseen
    Path("/proc/self/clear_refs").write_text("5")  # Linux: VmHWM starts again from the present size
    return hardware.peak_memory(device)


def whole(residual: str, arguments: argparse.Namespace, device: torch.device) -> dict[str, float]:
    """Milliseconds of the step in one process, micro-batch after micro-batch."""
    decoder = Decoder(shape(residual, arguments)).to(device)
    inputs, targets = tokens(arguments, device)
    found = []
    for _ in range(4):
        began = time.perf_counter()
        for part, target in zip(inputs.split(1), targets.split(1), strict=True):
            with hardware.autocast(device, precision(device)):
                logits = decoder(part)
            loss(logits, target).backward()
        hardware.synchronize(device)
        found.append(1e3 * (time.perf_counter() - began))
    return timing.spread(found[1:])


def ranged(found: dict[str, float]) -> str:
    return f"{found['median']:.0f} ({found['min']:.0f}..{found['max']:.0f})"


def report(
    arguments: argparse.Namespace,
    device: torch.device,
    times: dict[str, list[float]],
    busy: dict[str, list[float]],
    gathered: list[dict[str, dict[str, int]]],
    alone: dict[str, dict[str, float]],
) -> None:
    plain, plainly_busy = median(times["prenorm"]), median(busy["prenorm"])
    rows = {
        name: {
            "milliseconds": timing.spread(values),
            "ratio": median(values) / plain,
            "processor_milliseconds": timing.spread(busy[name]),
            "processor_ratio": median(busy[name]) / plainly_busy,
            "peak_bytes": max(own[name]["peak"] for own in gathered),
            "stored_bytes": max(own[name]["stored"] for own in gathered),
            "sent_bytes": sum(own[name]["sent"] for own in gathered),
        }
        for name, values in times.items()
    }
    facts = timing.facts(
        device, repeats=arguments.repeats, width=arguments.width, blocks=arguments.blocks, context=arguments.context
    )
    ratio = alone["block_attnres"]["median"] / alone["prenorm"]["median"]
    lines = [
        f"{facts['device']}, torch {facts['torch']}, commit {facts['commit']}, {facts['date']}: {PROCESSES} processes, "
        f"{STAGES} stages each, {SCHEDULE}, {MICROBATCHES} micro-batches of {arguments.context} tokens, width "
        f"{arguments.width}, {arguments.blocks} Transformer blocks, {precision(device)}, {arguments.repeats} rounds.",
        "",
        "| residual | step, ms (range) | of prenorm's | processor time, ms (range) | of prenorm's | peak of a rank | "
        "stored for later chunks | sent in a step |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        lines.append(
            f"| {name} | {ranged(row['milliseconds'])} | {row['ratio']:.2f}x | "
            f"{ranged(row['processor_milliseconds'])} | {row['processor_ratio']:.2f}x | "
            f"{row['peak_bytes'] / 2**20:.0f} MiB | {row['stored_bytes'] / 2**20:.1f} MiB | "
            f"{row['sent_bytes'] / 2**20:.1f} MiB |"
        )
    lines += ["", f"In one process block_attnres takes {ratio:.2f}x of prenorm's step."]
    values = {**facts, "rows": rows, "one_process": alone}
    timing.save(arguments.out, f"pipeline_{device.type}_{arguments.width}", values, lines)
    print("\n".join(lines), flush=True)


if __name__ == "__main__":
    main()
