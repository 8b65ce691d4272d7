"""Continuous batching against one request after another: tokens a second for requests that are there at once.

    python benchmarks/serving.py

The model has random weights; both ways generate the same greedy tokens, which is checked first. Rounds take turns, so
that other load on the machine falls on both; the figure to read is their ratio, in wall time or in CPU time. The batch
is kept between rounds, as a server keeps it: making one takes longer than a short answer of a small model.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import timing
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, logging

import attnres.hf

PROMPTS = (16, 96)
"""Shortest and longest prompt in tokens."""


def make(residual: str, arguments: argparse.Namespace, device: torch.device) -> Any:
    config = attnres.hf.AttnResConfig(
        vocab_size=8192,
        hidden_size=arguments.width,
        num_hidden_layers=arguments.blocks,
        num_attention_heads=arguments.width // 64,
        residual=residual,
    )
    torch.manual_seed(0)
    return attnres.hf.AttnResForCausalLM(config).to(device).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--residuals", default="block_attnres")
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64, help="generated for each request")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--blocks", type=int, default=8, help="Transformer blocks")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=timing.RESULTS)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    logging.set_verbosity_error()  # it warns of an end of text that never comes, at every request
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(PROMPTS[0], PROMPTS[1] + 1, (arguments.requests,), generator=generator).tolist()
    prompts = [torch.randint(8192, (n,), generator=generator).tolist() for n in lengths]
    settings = GenerationConfig(max_new_tokens=arguments.tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
    room = ContinuousBatchingConfig(num_blocks=2 * arguments.requests, max_batch_tokens=512)
    variants = {}
    for residual in arguments.residuals.split(","):
        alone, together = make(residual, arguments, device), make(residual, arguments, device)
        print(f"{residual}: both ways once, for the tokens", file=sys.stderr, flush=True)
        want = one_by_one(alone, prompts, settings, device)
        assert batched(together, prompts, settings, room) == want, f"{residual}: the two ways differ"
        variants[f"{residual}, one after another"] = timed(
            lambda model=alone: one_by_one(model, prompts, settings, device), device
        )
        variants[f"{residual}, continuous batching"] = timed(
            lambda model=together: batched(model, prompts, settings, room), device
        )
    times = timing.interleave(variants, arguments.repeats, warmup=0)
    report(times, arguments, device)


def timed(call: Callable[[], Any], device: torch.device) -> Callable[[], dict[str, float]]:
    """Milliseconds of a call: by the clock, and of CPU time in all threads."""

    def run() -> dict[str, float]:
        before = time.process_time()
        wall = timing.wall(call, device)
        print(f"a round in {wall / 1e3:.1f} s", file=sys.stderr, flush=True)
        return {"wall": wall, "cpu": 1e3 * (time.process_time() - before)}

    return run


def one_by_one(
    model: Any, prompts: list[list[int]], settings: GenerationConfig, device: torch.device
) -> list[list[int]]:
    ids = [torch.tensor([prompt], device=device) for prompt in prompts]
    return [model.generate(row, generation_config=settings)[0, row.shape[1] :].tolist() for row in ids]


def batched(
    model: Any, prompts: list[list[int]], settings: GenerationConfig, room: ContinuousBatchingConfig
) -> list[list[int]]:
    results = model.generate_batch(
        prompts, settings, continuous_batching_config=room, warmup=False, persistent_manager=True
    )
    return [result.generated_tokens for result in results.values()]


def report(times: timing.Times, arguments: argparse.Namespace, device: torch.device) -> None:
    produced = arguments.requests * arguments.tokens
    facts = timing.facts(
        device,
        transformers=timing.version("transformers"),
        threads=torch.get_num_threads(),
        **{name: getattr(arguments, name) for name in ("requests", "tokens", "width", "blocks", "repeats")},
    )
    rows = {name: [1e3 * produced / t for t in parts["wall"]] for name, parts in times.items()}
    lines = [
        f"{facts['device']}, torch {facts['torch']}, transformers {facts['transformers']}, {facts['threads']} threads, "
        f"commit {facts['commit']}, {facts['date']}: {arguments.requests} requests of {PROMPTS[0]} to {PROMPTS[1]} "
        f"tokens, {arguments.tokens} generated for each, width {arguments.width}, {arguments.blocks} Transformer "
        f"blocks, float32, medians of {arguments.repeats} rounds (lowest to highest). Other programs ran beside it.",
        "",
        "| | tokens/s | of one after another | CPU time of a round, s | of one after another |",
        "|---|---|---|---|---|",
    ]
    for name, rates in rows.items():
        rival = f"{name.partition(',')[0]}, one after another"
        cpu = [t / 1e3 for t in times[name]["cpu"]]
        lines.append(
            f"| {name} | {median(rates):.0f} ({min(rates):.0f} to {max(rates):.0f}) | "
            f"{median(rates) / median(rows[rival]):.2f}x | {median(cpu):.1f} ({min(cpu):.1f} to {max(cpu):.1f}) | "
            f"{1e3 * median(cpu) / median(times[rival]['cpu']):.2f}x |"
        )
    timing.save(arguments.out, f"serving_{device.type}", {**facts, "tokens_per_second": rows, "ms": times}, lines)
    print("\n".join(lines), flush=True)


if __name__ == "__main__":
    main()
