"""What a residual connection costs in inference: milliseconds per decoded token, and prefill throughput.

    OMP_NUM_THREADS=1 PYTHONPATH=src python benchmarks/inference.py --budget 540  # again: goes on

Decoders (d=1024, 24 Transformer blocks, bf16) with the standard residual, Block AttnRes (N=8), Full AttnRes and mHC
over the same other weights. Each question is timed in rounds in which every variant takes its turn, so that other load
on the machine meets all alike; read the ratios, medians of the rounds' own. On a CPU a time is that of the processor,
summed over its threads, which programs beside it disturb less than the clock's; on a GPU it is the clock's, and a
decoded token is also measured as a CUDA graph's replay.

Without trained weights queries are random: a read costs the same whatever it weighs.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import timing
import torch

from attnres.model import Decoder, DecoderConfig
from attnres.model.cache import KeyValueCache
from attnres.run import hardware

RESIDUALS = {"standard": "prenorm", "Block": "block_attnres", "Full": "full_attnres", "mHC": "mhc"}
PAST = 64
"""Tokens in the cache before the first decoded one."""


@dataclass(frozen=True)
class Shape:
    """width, Transformer blocks and dtype of the decoders."""

    width: int
    blocks: int
    dtype: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=timing.RESULTS, help="folder of the results")
    parser.add_argument("--budget", type=float, default=540.0, help="seconds; a later run goes on")
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--blocks", type=int, default=24, help="Transformer blocks")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32], help="sequences decoded at once")
    parser.add_argument("--prompts", type=int, nargs="+", default=[64, 512, 2048], help="tokens of a prefill")
    parser.add_argument("--rounds", type=int, default=20, help="timed rounds of decoding; of prefill a quarter")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")
    arguments = parser.parse_args()
    budget, device = timing.Budget(arguments.budget), hardware.find_device(arguments.device)
    shape = {name: getattr(arguments, name) for name in ("width", "blocks", "dtype", "rounds")}
    shape["processor time"] = device.type == "cpu"
    facts = timing.facts(device, threads=torch.get_num_threads(), **shape)
    file = arguments.out / f"inference_{device.type}.json"
    rows = earlier(file, facts)
    models = make(Shape(arguments.width, arguments.blocks, arguments.dtype), device)
    questions: dict[str, Callable[[], timing.Times]] = {}
    for batch in arguments.batches:
        questions[f"decode, batch {batch}"] = lambda b=batch: decode(models, b, arguments.rounds, device)
        if device.type == "cuda":
            questions[f"decode, batch {batch}, CUDA graph"] = lambda b=batch: replay(
                models, b, arguments.rounds, device
            )
    for tokens in arguments.prompts:
        rounds = max(3, arguments.rounds // 4)
        questions[f"prefill, {tokens} tokens"] = lambda t=tokens, r=rounds: prefill(models, t, r, device)
    failed: dict[str, str] = {}
    for name, ask in questions.items():
        if name in rows:
            continue
        answer: timing.Times = {}

        def run(ask: Callable[[], timing.Times] = ask, answer: timing.Times = answer) -> None:
            answer.update(ask())

        reason = timing.attempt(run, budget, budget.left(), device)
        if reason is not None:
            failed[name] = reason
            continue
        rows[name] = {variant: parts["ms"] for variant, parts in answer.items()}
        not_reached = [other for other in questions if other not in rows]
        document = {**facts, "milliseconds": rows, "failed": failed, "not reached": not_reached}
        timing.save(arguments.out, file.stem, document, markdown(document))
    print("\n".join([*markdown({**facts, "milliseconds": rows}), *(f"Failed: {n}: {r}" for n, r in failed.items())]))


def earlier(file: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """What an earlier run with the same facts, but for the day and the commit, has measured."""
    if not file.exists():
        return {}
    document = json.loads(file.read_text())
    same = all(document.get(name) == value for name, value in facts.items() if name not in ("date", "commit"))
    return document["milliseconds"] if same else {}


@torch.no_grad()
def make(shape: Shape, device: torch.device, residuals: dict[str, str] = RESIDUALS) -> dict[str, Decoder]:
    """A decoder for each residual connection; their layers, embedding and head are the same modules."""
    models: dict[str, Decoder] = {}
    for title, residual in residuals.items():
        config = DecoderConfig(
            vocab_size=8192,
            hidden_size=shape.width,
            num_hidden_layers=shape.blocks,
            num_attention_heads=max(1, shape.width // 64),
            max_position_embeddings=8192,
            residual=residual,
        )
        torch.manual_seed(0)
        if not models:
            models[title] = Decoder(config).to(device, getattr(torch, shape.dtype)).eval()
            continue
        shared = models["standard"]
        model = models[title] = copy.copy(shared)
        model._modules = dict(shared._modules)
        model.config, model.residual = config, config.build_residual().to(shared.embed_tokens.weight).eval()
        if hasattr(model.residual, "pseudo_query"):
            model.residual.pseudo_query.normal_(std=config.hidden_size**-0.5)
    return models


@torch.inference_mode()
def decode(models: dict[str, Decoder], batch: int, rounds: int, device: torch.device) -> timing.Times:
    """One more token for each of `batch` sequences."""
    first = torch.zeros(batch, PAST, dtype=torch.long, device=device)
    token = first[:, :1]
    caches = {title: KeyValueCache() for title in models}
    for title, model in models.items():
        model(first, caches[title])
    return timed(
        {title: lambda m=model, c=caches[title]: m(token, c) for title, model in models.items()}, rounds, device
    )


@torch.inference_mode()
def prefill(models: dict[str, Decoder], tokens: int, rounds: int, device: torch.device) -> timing.Times:
    """A prompt of so many tokens, its keys and values kept."""
    ids = torch.zeros(1, tokens, dtype=torch.long, device=device)
    return timed({title: lambda m=model: m(ids, KeyValueCache()) for title, model in models.items()}, rounds, device)


@torch.inference_mode()
def replay(models: dict[str, Decoder], batch: int, rounds: int, device: torch.device) -> timing.Times:
    """A captured step with keys and values of fixed size: what the device itself needs for a token."""
    token = torch.zeros(batch, 1, dtype=torch.long, device=device)
    graphs, steps = {}, []
    for title, model in models.items():
        cache = KeyValueCache()
        model(token.expand(batch, PAST), cache)
        kept = {layer: (cache.keys[layer], cache.values[layer]) for layer in cache.keys}

        def step(model: Decoder = model, cache: KeyValueCache = cache, kept: dict[int, Any] = kept) -> None:
            for layer, (keys, values) in kept.items():  # the same past for every replay
                cache.keys[layer], cache.values[layer] = keys, values
            model(token, cache)

        steps.append(step)  # replays read the past where it lay when they were captured
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream(device).wait_stream(side)
        graphs[title] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[title]):
            step()
    return timed({title: graph.replay for title, graph in graphs.items()}, rounds, device)


def timed(calls: dict[str, Callable[[], Any]], rounds: int, device: torch.device) -> timing.Times:
    variants = {title: lambda call=call: {"ms": milliseconds(call, device)} for title, call in calls.items()}
    return timing.interleave(variants, rounds)


def milliseconds(call: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        return timing.wall(call, device)
    start = time.process_time()
    call()
    return 1e3 * (time.process_time() - start)


def markdown(document: dict[str, Any]) -> list[str]:
    clock = "ms of processor time" if document["processor time"] else "ms"
    lines = [
        f"{document['device']}, torch {document['torch']}, commit {document['commit']}, "
        f"{document['date']}: d={document['width']}, {document['blocks']} Transformer blocks, {document['dtype']}; "
        f"medians of interleaved rounds (lowest to highest), {clock}. Ratios are medians over rounds; those of prefill "
        f"are of the time for the same tokens.",
        "",
    ]
    rows = []
    for question, times in document["milliseconds"].items():
        for title, values in times.items():
            ratio = median(a / b for a, b in zip(values, times["standard"], strict=True))
            fastest = min(values) / min(times["standard"])
            spread = f"{median(values):.1f} ({min(values):.1f} to {max(values):.1f})"
            rows.append([question, title, spread, rate(question, median(values)), f"{ratio:.3f}", f"{fastest:.3f}"])
    header = ["", "residual", "ms", "tokens/s", "of standard", "of its fastest"]
    return [*lines, *timing.markdown_table(header, rows)]


def rate(question: str, ms: float) -> str:
    tokens = next(int(word) for word in question.replace(",", "").split() if word.isdigit())
    return f"{1e3 * tokens / ms:.0f}"


if __name__ == "__main__":
    main()
