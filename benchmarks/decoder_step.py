"""What depth attention costs in training on this machine: one read, and one whole decoder step.

    PYTHONPATH=src python benchmarks/decoder_step.py [--out benchmarks/results] [--repeats 7] [--dtype float32 bfloat16]

Two questions, each answered in one process, medians over interleaved repeats, ratios to the rival of the same run:
1. One read of 9 sources, [2048, 512], forward and backward: the paper's straightforward form (stack, RMSNorm, einsum)
   against this library's op, with and without torch.compile.
2. One training step, forward and backward, of a decoder (d=512, 12 Transformer blocks = 24 layers, N=8, 2048 tokens):
   prenorm, Block AttnRes, Full AttnRes, and Block with the straightforward form in place of the op.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import rivals
import timing
import torch
from torch.nn import functional as F

from attnres import ops
from attnres.model import Decoder, DecoderConfig
from attnres.train import hardware

TOKENS, WIDTH, SOURCES = 2048, 512, 9
CONTEXT = 256
SHAPE = dict(hidden_size=WIDTH, num_hidden_layers=12, num_attention_heads=8, max_position_embeddings=CONTEXT)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=timing.RESULTS, help="folder of the results")
    parser.add_argument("--repeats", type=int, default=7, help="timed repeats of every variant")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")
    arguments = parser.parse_args()
    device = hardware.find_device(arguments.device)
    facts = timing.facts(device, repeats=arguments.repeats)
    tables = {}
    for name in arguments.dtype:
        dtype = getattr(torch, name)
        tables[f"one read, {name}"] = compare(reads(dtype, device), arguments.repeats, device, "straightforward")
        tables[f"decoder step, {name}"] = compare(steps(dtype, device), arguments.repeats, device, "prenorm")
    lines = markdown(facts, tables)
    timing.save(arguments.out, f"decoder_step_{device.type}", {**facts, "milliseconds": tables}, lines)
    print("\n".join(lines))


def reads(dtype: torch.dtype, device: torch.device) -> dict[str, Callable[[], Any]]:
    """One read of SOURCES sources and its backward pass, a variant a form."""
    torch.manual_seed(0)
    query, key_norm = torch.randn(WIDTH, device=device), torch.ones(WIDTH, device=device)
    sources = [torch.randn(TOKENS, WIDTH, device=device, dtype=dtype) for _ in range(SOURCES)]
    direction = torch.randn_like(sources[0])
    leaves = [t.requires_grad_() for t in (query, key_norm, *sources)]

    def variant(op: Callable[..., Any]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(op(query, sources, key_norm, 1e-6), leaves, direction)

    def straightforward(query: Any, sources: Any, key_norm: Any, eps: float) -> torch.Tensor:
        return rivals.straightforward(query, sources, key_norm, eps, None)

    forms = {"straightforward": straightforward, "attnres": ops.depth_attention}
    compiled = {f"{name}, compiled": torch.compile(op, fullgraph=True) for name, op in forms.items()}
    return {name: variant(op) for name, op in (*forms.items(), *compiled.items())}


def steps(dtype: torch.dtype, device: torch.device) -> dict[str, Callable[[], Any]]:
    """One forward and backward pass over TOKENS tokens, a variant a residual connection."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 257, (TOKENS // CONTEXT, CONTEXT), generator=generator).to(device)

    def variant(residual: str, plain: bool = False) -> Callable[[], Any]:
        model = Decoder(DecoderConfig(**SHAPE, residual=residual)).to(device)  # type: ignore[arg-type]
        if plain:
            model.residual = rivals.plug(model.residual, rivals.STRAIGHTFORWARD)

        def step() -> None:
            with hardware.autocast(device, dtype):
                logits = model(ids)
            F.cross_entropy(logits.flatten(0, 1).float(), ids.flatten()).backward()
            model.zero_grad(set_to_none=True)

        return step

    return {
        "prenorm": variant("prenorm"),
        "block_attnres": variant("block_attnres"),
        "full_attnres": variant("full_attnres"),
        "block_attnres, straightforward": variant("block_attnres", plain=True),
        "full_attnres, straightforward": variant("full_attnres", plain=True),
    }


def compare(variants: dict[str, Callable[[], Any]], repeats: int, device: torch.device, rival: str) -> dict[str, Any]:
    """Median and extremes of each variant in milliseconds, and its ratio to the rival, over interleaved repeats."""
    timed = {name: lambda call=call: {"call": timing.wall(call, device)} for name, call in variants.items()}
    spreads = {name: timing.spread(parts["call"]) for name, parts in timing.interleave(timed, repeats).items()}
    return {name: {**row, "ratio": row["median"] / spreads[rival]["median"]} for name, row in spreads.items()}


def markdown(facts: dict[str, Any], tables: dict[str, Any]) -> list[str]:
    lines = ["# One read and one decoder step", "", ", ".join(f"{k} {v}" for k, v in facts.items()), ""]
    for title, rows in tables.items():
        cells = [
            [name, *(f"{row[part]:.1f}" for part in ("median", "min", "max")), f"{row['ratio']:.3f}"]
            for name, row in rows.items()
        ]
        lines += [f"## {title}, forward and backward", ""]
        lines += timing.markdown_table(["", "median ms", "min", "max", "ratio"], cells)
    return lines


if __name__ == "__main__":
    main()
