"""Peak memory of a training step over depth: what depth attention adds to the plain model, checkpointed or not.

    PYTHONPATH=src python benchmarks/memory.py [--out benchmarks/results] [--device cpu]

A step is forward, loss and backward. Peaks are the allocator's own, above what is there before the step (weights and
their gradients): torch's memory profiler on CPUs, max_memory_allocated on CUDA. The unit is one [T, D] tensor of the
stream. Decoders of several depths in turn tell what a further Transformer block costs and what does not grow with it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timing
import torch
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from attnres.model import Decoder, DecoderConfig
from attnres.run import hardware

SEQUENCES, CONTEXT, WIDTH, NUM_BLOCKS = 4, 256, 128, 8
DEPTHS = (8, 16, 24)
RESIDUALS: dict[str, dict[str, Any]] = {
    "prenorm": {},
    "block_attnres": {"num_blocks": NUM_BLOCKS},
    "full_attnres": {},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=timing.RESULTS, help="folder of the results")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")
    arguments = parser.parse_args()
    device = hardware.find_device(arguments.device)
    dtype = hardware.find_precision("auto" if device.type == "cuda" else "float32", device)
    unit = SEQUENCES * CONTEXT * WIDTH * dtype.itemsize
    facts = timing.facts(device, dtype=str(dtype), tokens=SEQUENCES * CONTEXT, width=WIDTH, num_blocks=NUM_BLOCKS)
    tables = {}
    for mode in ("checkpointed", "plain"):
        tables[mode] = {
            name: {n: step_peak(name, options, n, mode == "checkpointed", device, dtype) / unit for n in DEPTHS}
            for name, options in RESIDUALS.items()
        }
    lines = ["# Peak memory of a training step", "", ", ".join(f"{k} {v}" for k, v in facts.items()), ""]
    for mode, rows in tables.items():
        cells = [
            [name, *(f"{peak:.1f}" for peak in peaks.values()), f"{growth(peaks):.2f}"] for name, peaks in rows.items()
        ]
        lines += [f"## {mode}, in [T, D] tensors of the stream", ""]
        lines += timing.markdown_table(["Transformer blocks", *map(str, DEPTHS), "for each further one"], cells)
    timing.save(arguments.out, f"memory_{device.type}", {**facts, "peaks": tables}, lines)
    print("\n".join(lines))


def growth(peaks: dict[int, float]) -> float:
    """What each further Transformer block adds, from the deepest two."""
    (fewer, before), (more, after) = list(peaks.items())[-2:]
    return (after - before) / (more - fewer)


def step_peak(
    residual: str, options: dict[str, Any], depth: int, checkpointed: bool, device: torch.device, dtype: torch.dtype
) -> int:
    """Bytes at the fullest moment of a step of a decoder of `depth` Transformer blocks, above those before it."""
    config = DecoderConfig(
        hidden_size=WIDTH,
        num_hidden_layers=depth,
        num_attention_heads=max(1, WIDTH // 64),
        max_position_embeddings=CONTEXT,
        residual=residual,
        residual_options=options,
    )
    model = Decoder(config).to(device)
    if checkpointed:
        model.enable_checkpointing()
    ids = torch.randint(0, config.vocab_size, (SEQUENCES, CONTEXT), device=device)

    def step() -> None:
        with hardware.autocast(device, dtype):
            logits = model(ids)
        F.cross_entropy(logits.flatten(0, 1).float(), ids.flatten()).backward()

    step()  # gradients are there from now on
    return allocated(step, device)[0]


def allocated(call: Callable[[], Any], device: torch.device) -> tuple[int, int]:
    """(most bytes that a call has allocated at one time, what is left of them while its result is there)."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = call()
        torch.cuda.synchronize(device)
        left = torch.cuda.memory_allocated(device)
        del result
        return torch.cuda.max_memory_allocated(device) - before, left - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = call()
    del result
    kineto = profiler.profiler
    assert kineto is not None and kineto.kineto_results is not None
    changes = [event for event in kineto.kineto_results.events() if event.name() == "[memory]"]
    live = most = 0
    for change in sorted(changes, key=lambda event: event.start_ns()):
        live += change.nbytes()
        most = max(most, live)
    return most, live


if __name__ == "__main__":
    main()
