"""What depth attention costs a CPU in training, in processor time: whole steps and one read, on one thread.

    PYTHONPATH=src python benchmarks/native.py [--dtype float32 bfloat16] [--width 128 512] [--repeats 9]

Processor time counts what this process used, so that others on the machine disturb it less than the clock; they still
take caches and memory from it. Ratios are of two calls in the same round; their medians and extremes over the rounds
are shown.
- steps: forward and backward of a decoder of 12 Transformer blocks over 1024 tokens, to prenorm of PyTorch's own
  operations ("plain") and to this library's prenorm ("fused"); of what else reads sums of sources also without C.
- read: 9 sources [2048, 512], forward and backward, to the paper's straightforward form.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timing
import torch
from torch.nn import functional as F

from attnres import ops
from attnres.bench.rivals import straightforward
from attnres.model import Decoder, DecoderConfig
from attnres.run import hardware

BATCHES = {128: (8, 128), 512: (2, 512)}
"""Sequences and tokens of each, by width."""
SUMS = ("delta_attnres", "lowrank_attnres", "multihead_attnres", "denseformer", "ancre", "muddformer")
"""Further mechanisms whose reads are sums of sources."""
CPU = torch.device("cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=timing.RESULTS, help="folder of the results")
    parser.add_argument("--repeats", type=int, default=9, help="rounds")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--width", nargs="+", type=int, default=[*BATCHES], choices=[*BATCHES])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tables: dict[str, Any] = {}
    facts = timing.facts(CPU, threads=1, repeats=arguments.repeats)
    for name in arguments.dtype:
        dtype = getattr(torch, name)
        for width in arguments.width:
            tables[f"training step, d={width}, {name}"] = compare(steps(width, dtype), arguments.repeats, rivals=2)
        tables[f"one read, {name}"] = compare(reads(dtype), arguments.repeats, rivals=1)
        lines = markdown(facts, tables)
        timing.save(arguments.out, "native_cpu", {**facts, "processor_milliseconds": tables}, lines)
    print("\n".join(lines))


def steps(width: int, dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    """One forward and backward pass, a variant a residual connection."""
    batch, tokens = BATCHES[width]
    ids = torch.randint(0, 257, (batch, tokens), generator=torch.Generator().manual_seed(0))

    def step(residual: str, backend: str = "auto") -> Callable[[], Any]:
        model = Decoder(
            DecoderConfig(
                hidden_size=width,
                num_hidden_layers=12,
                num_attention_heads=width // 64,
                max_position_embeddings=tokens,
                residual=residual,
            )
        )

        def call() -> None:
            ops.set_backend(backend)
            with hardware.autocast(CPU, dtype):
                logits = model(ids)
            F.cross_entropy(logits.flatten(0, 1).float(), ids.flatten()).backward()
            model.zero_grad(set_to_none=True)
            ops.set_backend("auto")

        return call

    return {
        "prenorm, plain": step("prenorm", "reference"),
        "prenorm, fused": step("prenorm"),
        "block_attnres": step("block_attnres"),
        "full_attnres": step("full_attnres"),
        **{name: step(name) for name in SUMS},
        **{f"{name}, without C": step(name, "eager") for name in SUMS},
    }


def reads(dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    """One read and its backward pass, a variant a form."""
    torch.manual_seed(0)
    query, key_norm = torch.randn(512), torch.ones(512)
    sources = [torch.randn(2048, 512, dtype=dtype) for _ in range(9)]
    direction = torch.randn_like(sources[0])
    leaves = [t.requires_grad_() for t in (query, key_norm, *sources)]
    forms: dict[str, Callable[[], torch.Tensor]] = {
        "straightforward": lambda: straightforward(query, sources, key_norm, 1e-6, None),
        "attnres": lambda: ops.depth_attention(query, sources, key_norm, 1e-6),  # type: ignore[dict-item, return-value]
    }
    return {name: lambda form=form: torch.autograd.grad(form(), leaves, direction) for name, form in forms.items()}


def compare(variants: dict[str, Callable[[], Any]], repeats: int, rivals: int) -> dict[str, Any]:
    """Of each variant the spread of its milliseconds, and of its ratios to the first `rivals` in the same round."""
    timed = {name: lambda call=call: {"call": spent(call)} for name, call in variants.items()}
    times = {name: parts["call"] for name, parts in timing.interleave(timed, repeats).items()}
    rows: dict[str, Any] = {}
    for name, mine in times.items():
        rows[name] = dict(timing.spread(mine))
        for rival, others in list(times.items())[:rivals]:
            rows[name][f"to {rival}"] = timing.spread([a / b for a, b in zip(mine, others, strict=True)])
    return rows


def spent(call: Callable[[], Any]) -> float:
    """Milliseconds of processor time."""
    start = time.process_time()
    call()
    return 1e3 * (time.process_time() - start)


def markdown(facts: dict[str, Any], tables: dict[str, Any]) -> list[str]:
    lines = ["# Depth attention in C: processor time", "", ", ".join(f"{k} {v}" for k, v in facts.items()), ""]
    for title, rows in tables.items():
        ratios = [key for key in next(iter(rows.values())) if key.startswith("to ")]
        cells = [
            [
                name,
                *(f"{row[part]:.1f}" for part in ("median", "min", "max")),
                *(f"{row[key]['median']:.3f} ({row[key]['min']:.3f}-{row[key]['max']:.3f})" for key in ratios),
            ]
            for name, row in rows.items()
        ]
        lines += [f"## {title}, forward and backward", ""]
        lines += timing.markdown_table(["", "median ms", "min", "max", *ratios], cells)
    return lines


if __name__ == "__main__":
    main()
