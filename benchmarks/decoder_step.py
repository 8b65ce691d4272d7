"""What depth attention costs in training on this machine: one read, and one whole decoder step.

    PYTHONPATH=src python benchmarks/decoder_step.py [--dtype float32 bfloat16] [--only reads steps compiled]

Three questions, each answered in one process, medians over interleaved repeats, ratios to the rival of the same run:
- reads: one read of 9 sources, [2048, 512], forward and backward: the paper's straightforward form (stack, RMSNorm,
  einsum) against this library's op, with and without torch.compile.
- steps: one training step, forward and backward, of a decoder (d=512, 12 Transformer blocks = 24 layers, N=8, 2048
  tokens): prenorm, Block AttnRes, Full AttnRes, and these two with the straightforward form in place of the op.
- compiled: the same of whole decoders under torch.compile, this library's alone. Compiling takes minutes each on a CPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timing
import torch
from torch.nn import functional as F

from attnres import ops
from attnres.bench import rivals
from attnres.model import Decoder, DecoderConfig
from attnres.run import hardware

TOKENS, WIDTH, SOURCES = 2048, 512, 9
CONTEXT = 256
RESIDUALS = ("prenorm", "block_attnres", "full_attnres")
SHAPE: dict[str, Any] = dict(
    hidden_size=WIDTH, num_hidden_layers=12, num_attention_heads=8, max_position_embeddings=CONTEXT
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=timing.RESULTS, help="folder of the results")
    parser.add_argument("--repeats", type=int, default=7, help="timed repeats of every variant")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--only", nargs="+", default=list(QUESTIONS), choices=list(QUESTIONS), metavar="QUESTION")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")
    arguments = parser.parse_args()
    device = hardware.find_device(arguments.device)
    facts = timing.facts(device, repeats=arguments.repeats)
    tables: dict[str, Any] = {}
    for name in arguments.dtype:
        for question in arguments.only:
            title, rival, variants = QUESTIONS[question]
            made = variants(getattr(torch, name), device)
            tables[f"{title}, {name}"] = compare(made, arguments.repeats, device, rival)
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
    made = {name: step(Decoder(DecoderConfig(**SHAPE, residual=name)), dtype, device) for name in RESIDUALS}
    for name in RESIDUALS[1:]:
        model = Decoder(DecoderConfig(**SHAPE, residual=name))
        model.residual = rivals.plug(model.residual, rivals.STRAIGHTFORWARD)
        made[f"{name}, straightforward"] = step(model, dtype, device)
    return made


def compiled_steps(dtype: torch.dtype, device: torch.device) -> dict[str, Callable[[], Any]]:
    """The same of whole decoders that torch.compile made one graph of."""
    return {
        name: step(Decoder(DecoderConfig(**SHAPE, residual=name)), dtype, device, timing.compiled) for name in RESIDUALS
    }


def step(
    model: Decoder, dtype: torch.dtype, device: torch.device, transform: Callable[..., Any] = lambda model: model
) -> Callable[[], Any]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 257, (TOKENS // CONTEXT, CONTEXT), generator=generator).to(device)

    forward = transform(model.to(device))

    def call() -> None:
        with hardware.autocast(device, dtype):
            logits = forward(ids)
        F.cross_entropy(logits.flatten(0, 1).float(), ids.flatten()).backward()
        model.zero_grad(set_to_none=True)

    return call


QUESTIONS = {
    "reads": ("one read", "straightforward", reads),
    "steps": ("decoder step", "prenorm", steps),
    "compiled": ("decoder step, compiled", "prenorm", compiled_steps),
}
"""Title, the rival of its ratios, and its variants."""


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
