"""Continuous batching against one request after another: tokens a second for requests that are there at once.

    python benchmarks/serving.py

The model has random weights; both ways generate the same greedy tokens, which is checked. Rounds take turns, so that
other load on the machine falls on both; the figure to read is their ratio.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import median
from typing import Any

import timing
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

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
    parser.add_argument("--residuals", default="prenorm,block_attnres")
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=16, help="generated for each request")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--blocks", type=int, default=4, help="Transformer blocks")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=timing.RESULTS)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(PROMPTS[0], PROMPTS[1] + 1, (arguments.requests,), generator=generator).tolist()
    prompts = [torch.randint(8192, (n,), generator=generator).tolist() for n in lengths]
    settings = GenerationConfig(max_new_tokens=arguments.tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
    room = ContinuousBatchingConfig(num_blocks=2 * arguments.requests, max_batch_tokens=512)
    variants = {}
    for residual in arguments.residuals.split(","):
        alone, together = make(residual, arguments, device), make(residual, arguments, device)
        want = one_by_one(alone, prompts, settings, device)
        assert batched(together, prompts, settings, room) == want, f"{residual}: the two ways differ"

        def after_one_another(model: Any = alone) -> dict[str, float]:
            return {"all": timing.wall(lambda: one_by_one(model, prompts, settings, device), device)}

        def at_once(model: Any = together) -> dict[str, float]:
            return {"all": timing.wall(lambda: batched(model, prompts, settings, room), device)}

        variants[f"{residual}, one after another"] = after_one_another
        variants[f"{residual}, continuous batching"] = at_once
    times = timing.interleave(variants, arguments.repeats, warmup=1)
    report(times, arguments, device)


def one_by_one(
    model: Any, prompts: list[list[int]], settings: GenerationConfig, device: torch.device
) -> list[list[int]]:
    ids = [torch.tensor([prompt], device=device) for prompt in prompts]
    return [model.generate(row, generation_config=settings)[0, row.shape[1] :].tolist() for row in ids]


def batched(
    model: Any, prompts: list[list[int]], settings: GenerationConfig, room: ContinuousBatchingConfig
) -> list[list[int]]:
    results = model.generate_batch(prompts, settings, continuous_batching_config=room, warmup=False)
    return [result.generated_tokens for result in results.values()]


def report(times: timing.Times, arguments: argparse.Namespace, device: torch.device) -> None:
    produced = arguments.requests * arguments.tokens
    facts = timing.facts(
        device,
        transformers=timing.version("transformers"),
        threads=torch.get_num_threads(),
        **{name: getattr(arguments, name) for name in ("requests", "tokens", "width", "blocks", "repeats")},
    )
    rows = {name: [1e3 * produced / t for t in parts["all"]] for name, parts in times.items()}
    lines = [
        f"{facts['device']}, torch {facts['torch']}, transformers {facts['transformers']}, {facts['threads']} threads, "
        f"commit {facts['commit']}, {facts['date']}: {arguments.requests} requests of {PROMPTS[0]} to {PROMPTS[1]} "
        f"tokens, {arguments.tokens} generated for each, width {arguments.width}, {arguments.blocks} Transformer "
        f"blocks, float32, medians of {arguments.repeats} rounds (lowest to highest). Start-up of the batch is in it. "
        f"Other programs ran on the machine.",
        "",
        "| | tokens/s | of one after another |",
        "|---|---|---|",
    ]
    for name, rates in rows.items():
        rival = rows[f"{name.partition(',')[0]}, one after another"]
        lines.append(
            f"| {name} | {median(rates):.0f} ({min(rates):.0f} to {max(rates):.0f}) | "
            f"{median(rates) / median(rival):.2f}x |"
        )
    timing.save(arguments.out, f"serving_{device.type}", {**facts, "tokens_per_second": rows}, lines)
    print("\n".join(lines), flush=True)


if __name__ == "__main__":
    main()
