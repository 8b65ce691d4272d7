"""Whole training steps of a decoder: the standard residual, Block and Full AttnRes, every rival's op in the same net.

    PYTHONPATH=src python benchmarks/training.py                       # one process, under ten minutes
    PYTHONPATH=src python benchmarks/training.py --quick --device cpu  # seconds, to see that it works

A step is forward, loss and backward over all tokens, under autocast on fp32 weights; no optimizer, whose time is the
same for all. All variants of a shape share one set of weights but for their pseudo-queries and key norms. Tokens per
second and their ratio to prenorm of the same mode (eager, compiled, checkpointed) in the same group, medians over
interleaved repeats; peak memory as allocated on the GPU. A rival has to give the loss and the gradients of this
library's reads before it is timed. The most important rows come first and results are saved after each group.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import rivals
import timing
import torch
from torch import Tensor
from torch.nn import functional as F

from attnres.model import Decoder, DecoderConfig
from attnres.train import hardware

TOLERANCE = {torch.bfloat16: 0.1, torch.float32: 1e-3}  # relative, of gradients through dozens of layers
PEERS = ("fla Triton", "flash-attn-res", "straightforward")
OTHER_PEERS = ("fla Gluon", "fast-attnres", "liger-kernel")


@dataclass(frozen=True)
class Shape:
    name: str
    config: DecoderConfig
    sequences: int

    @property
    def tokens(self) -> int:
        return self.sequences * self.config.max_position_embeddings


def shape(name: str, width: int, blocks: int, head_dim: int, sequences: int, context: int) -> Shape:
    heads = width // head_dim
    config = DecoderConfig(
        hidden_size=width, num_hidden_layers=blocks, num_attention_heads=heads, max_position_embeddings=context
    )
    return Shape(name, config, sequences)


@dataclass(frozen=True)
class Row:
    """A variant of a shape: a residual, whose op runs it, and how."""

    residual: str
    op: str = "attnres"
    compiled: bool = False
    checkpointed: bool = False

    @property
    def mode(self) -> str:
        return "compiled" if self.compiled else "checkpointed" if self.checkpointed else "eager"

    def __str__(self) -> str:
        return ", ".join([self.residual, *([] if self.op == "attnres" else [self.op]), self.mode])


OURS = [Row(name) for name in ("prenorm", "block_attnres", "full_attnres")]
OURS_COMPILED = [Row(row.residual, compiled=True) for row in OURS]
CHECKPOINTED = [Row(row.residual, checkpointed=True) for row in OURS]


def against(residual: str, peers: tuple[str, ...], compiled: bool = False) -> list[Row]:
    """Prenorm, this library and every peer in one group."""
    return [Row(name, compiled=compiled) for name in ("prenorm", residual)] + [
        Row(residual, peer, compiled) for peer in peers
    ]


class Nets:
    """Variants of one shape over shared weights."""

    def __init__(self, shape: Shape, device: torch.device, dtype: torch.dtype, found: dict[str, rivals.Rival]) -> None:
        self.shape, self.device, self.dtype, self.found = shape, device, dtype, found
        self.shared = Decoder(shape.config).to(device)
        generator = torch.Generator().manual_seed(0)
        size = (shape.sequences, shape.config.max_position_embeddings)
        self.ids = torch.randint(0, shape.config.vocab_size, size, generator=generator).to(device)

    def net(self, row: Row) -> Decoder:
        """A decoder whose layers are the shared ones."""
        config = DecoderConfig.from_dict({**self.shape.config.to_dict(), "residual": row.residual})
        net = copy.copy(self.shared)
        net._modules = dict(self.shared._modules)
        residual = config.build_residual().to(self.device)
        if row.residual != "prenorm":
            generator = torch.Generator().manual_seed(1)
            queries = torch.randn(residual.pseudo_query.shape, generator=generator) / config.hidden_size**0.5
            residual.pseudo_query.data.copy_(queries)
        if row.op != "attnres":
            residual = rivals.plug(residual, self.found[row.op])
        net.residual = residual
        if row.checkpointed:
            net.enable_checkpointing()
        return net

    def step(self, row: Row) -> Callable[[], Tensor]:
        """Forward and backward; the gradients stay until the next call. Returns the loss."""
        net = self.net(row)
        run = timing.compiled(net, fullgraph=row.op == "attnres") if row.compiled else net

        def step() -> Tensor:
            net.zero_grad(set_to_none=True)
            with hardware.autocast(self.device, self.dtype):
                logits = run(self.ids)
            loss = F.cross_entropy(logits.flatten(0, 1).float(), self.ids.flatten())
            loss.backward()
            return loss.detach()

        step.net = net  # type: ignore[attr-defined]
        return step

    @cache  # noqa: B019  lives as long as the run
    def expected(self, residual: str) -> list[Tensor]:
        """Loss and gradients with this library's reads, unscaled as the rivals' are: the norm that follows undoes it up
        to its eps, which matters where reads are small."""
        step = self.step(Row(residual))
        step.net.residual.stream_scale = False  # type: ignore[attr-defined]
        return observed(step)


def observed(step: Callable[[], Tensor]) -> list[Tensor]:
    """Loss, and the gradients that every read contributes to."""
    loss = step()
    net = step.net  # type: ignore[attr-defined]
    tensors = [loss, net.residual.pseudo_query.grad, net.residual.key_norm.grad, net.embed_tokens.weight.grad]
    return [t.detach().clone() for t in tensors]


def measure(
    rows: list[Row],
    nets: Nets,
    steps: dict[Row, Callable[[], Tensor]],
    budget: timing.Budget,
    seconds_to_prepare: float,
    repeats: int,
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Table rows of a group, and why others are not there. `steps` keeps what is ready for later groups."""
    left_out, memory, errors = {}, {}, {}
    ready = []
    for row in rows:
        if row.op != "attnres" and row.op not in nets.found:
            continue

        def prepare(row: Row = row) -> None:
            if row not in steps:
                step = nets.step(row)
                step()
                if row.op != "attnres":
                    errors[row] = timing.disagreement(observed(step), nets.expected(row.residual))
                    if errors[row] > TOLERANCE[nets.dtype]:
                        raise RuntimeError(f"loss or gradients disagree: relative error {errors[row]:.2g}")
                steps[row] = step
            steps[row]()
            memory[row] = peak_memory(steps[row], nets.device)

        if reason := timing.attempt(prepare, budget, seconds_to_prepare, nets.device):
            left_out[str(row)] = reason
            steps.pop(row, None)
        else:
            ready.append(row)
        nets.shared.zero_grad(set_to_none=True)
    timed = {str(row): lambda row=row: {"step": timing.wall(steps[row], nets.device)} for row in ready}
    times = timing.interleave(timed, repeats)
    table = []
    for row in ready:
        ms = timing.spread(times[str(row)]["step"])
        base = next((r for r in ready if r.residual == "prenorm" and r.mode == row.mode), None)
        table.append(
            {
                "residual": row.residual,
                "op": row.op if row.residual != "prenorm" else "add + norm",
                "mode": row.mode,
                "step_ms": ms,
                "tokens_per_second": nets.shape.tokens / (1e-3 * ms["median"]),
                "throughput_ratio": base and timing.spread(times[str(base)]["step"])["median"] / ms["median"],
                "peak_memory_bytes": memory[row],
                "memory_ratio": base and memory[row] and memory[row] / memory[base],
                "error": errors.get(row),
            }
        )
    return table, left_out


def peak_memory(step: Callable[[], Tensor], device: torch.device) -> int | None:
    """Bytes at the fullest moment of a step, weights and gradients included. A CPU does not tell."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device)


def lines_of(title: str, table: list[dict[str, Any]], left_out: dict[str, str]) -> list[str]:
    def text(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    rows = [
        [
            r["residual"],
            r["op"],
            r["mode"],
            f"{r['step_ms']['median']:.1f} ({r['step_ms']['min']:.1f} to {r['step_ms']['max']:.1f})",
            f"{r['tokens_per_second']:,.0f}",
            text(r["throughput_ratio"], ".3f"),
            text(r["peak_memory_bytes"] and r["peak_memory_bytes"] / 2**30, ".2f"),
            text(r["memory_ratio"], ".3f"),
            text(r["error"], ".1e"),
        ]
        for r in table
    ]
    header = ["residual", "op", "mode", "step ms (min to max)", "tokens/s", "ratio", "peak GiB", "ratio", "error"]
    notes = [f"- {name}: {reason}" for name, reason in left_out.items()]
    return [f"## {title}", "", *timing.markdown_table(header, rows), *notes, *([""] if notes else [])]


def groups(device: torch.device, quick: bool) -> list[tuple[Shape, str, list[Row]]]:
    """The most important first."""
    if quick:
        tiny = shape("d=32, 2 blocks", 32, 2, 16, sequences=2, context=16)
        return [
            (tiny, "eager", OURS),
            (tiny, "checkpointed", CHECKPOINTED),
            (tiny, "Block, rivals", against("block_attnres", PEERS)),
        ]
    if device.type != "cuda":
        small = shape("d=512, 12 blocks", 512, 12, 64, sequences=8, context=256)
        return [
            (small, "eager", OURS),
            (small, "Block, rivals", against("block_attnres", PEERS)),
            (small, "compiled", OURS_COMPILED),
            (small, "Full, rivals", against("full_attnres", PEERS)),
            (small, "Block, rivals, compiled", against("block_attnres", PEERS, compiled=True)),
        ]
    wide = shape("d=2048, 16 blocks", 2048, 16, 128, sequences=8, context=2048)
    deep = shape("d=1024, 24 blocks", 1024, 24, 128, sequences=8, context=2048)
    return [
        (wide, "eager", OURS),
        (deep, "eager", OURS),
        (wide, "compiled", OURS_COMPILED),
        (wide, "Block, rivals", against("block_attnres", PEERS)),
        (wide, "checkpointed", CHECKPOINTED),
        (deep, "Block, rivals", against("block_attnres", PEERS)),
        (deep, "compiled", OURS_COMPILED),
        (wide, "Block, other rivals", against("block_attnres", OTHER_PEERS)),
        (wide, "Block, rivals, compiled", against("block_attnres", PEERS, compiled=True)),
        (wide, "Full, rivals", against("full_attnres", (PEERS[0], *PEERS[2:], *OTHER_PEERS))),
        (deep, "Block, other rivals", against("block_attnres", OTHER_PEERS)),
        (deep, "Full, rivals", against("full_attnres", (PEERS[0], *PEERS[2:], *OTHER_PEERS))),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=timing.RESULTS, help="folder of the results")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help="of autocast")
    parser.add_argument("--budget", type=float, default=540, help="seconds; what is not reached is left out")
    parser.add_argument("--prepare", type=float, default=150, help="seconds for one variant to compile and tune")
    parser.add_argument("--repeats", type=int, default=10, help="timed steps of every variant")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, nothing compiled: does the script work?")
    parser.add_argument("--only", nargs="+", metavar="GROUP", help="groups by a part of their titles")
    arguments = parser.parse_args()
    budget = timing.Budget(arguments.budget)
    device = hardware.find_device(arguments.device)
    dtype = hardware.find_precision(arguments.dtype, device)
    found, missing = rivals.load(device)
    about = timing.facts(
        device,
        dtype=str(dtype),
        repeats=arguments.repeats,
        rivals={name: timing.version(rivals.PACKAGES[name]) for name in found if name in rivals.PACKAGES},
    )
    document: dict[str, Any] = {**about, "missing": missing, "groups": {}, "not reached": []}
    lines = ["# Training steps of a decoder", "", ", ".join(f"{k} {v}" for k, v in about.items()), ""]
    lines += [f"- {name} left out: {reason}" for name, reason in missing.items()] + [""]
    name = f"training_{device.type}{'_quick' if arguments.quick else ''}"
    nets: dict[str, Nets] = {}
    steps: dict[str, dict[Row, Callable[[], Tensor]]] = {}
    with timing.parallel_autotuning():
        for shape, group, rows in groups(device, arguments.quick):
            title = f"{shape.name}, {shape.tokens} tokens: {group}"
            if arguments.only and not any(word in title for word in arguments.only):
                continue
            if budget.left() < 0:
                document["not reached"].append(title)
                continue
            if shape.name not in nets:
                nets[shape.name], steps[shape.name] = Nets(shape, device, dtype, found), {}
            table, left_out = measure(
                rows, nets[shape.name], steps[shape.name], budget, arguments.prepare, arguments.repeats
            )
            document["groups"][title] = {"model": shape.config.to_dict(), "rows": table, "left_out": left_out}
            lines += lines_of(title, table, left_out)
            print("\n".join(lines_of(title, table, left_out)), flush=True)
            timing.save(arguments.out, name, document, lines)
    if document["not reached"]:
        lines.append("Not reached in the time budget: " + "; ".join(document["not reached"]))
    timing.save(arguments.out, name, document, lines)


if __name__ == "__main__":
    main()
