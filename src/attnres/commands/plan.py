"""attnres plan"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from ..errors import UsageError
from ..model import DecoderConfig, DecoderShape, preset
from ..parallel.config import ParallelConfig
from ..plan.prompt import InferencePlan, plan_inference
from ..plan.rank import RankPlan
from ..plan.training import Cluster, Plan, plan
from . import flags

ResidualFlags: Any = flags.residual_flags(with_name=True)


@dataclass
class PlanFlags(Cluster):
    """Say what training on many processes would take, without starting one: memory and parameters of every rank, bytes
    of every pipeline hop, the pipeline's bubble, and whether it fits. Parameters and bytes on the wire are exact; times
    follow from the rates given here. JSON has every hop; the table sums them up. With --inference: what reading a
    prompt takes of a process's memory, at once, over the processes of --parallel.tp, and in chunks."""

    inference: bool = False
    """Plan reading a prompt of --context tokens, not training."""
    prefill_chunk: int | None = None
    """Tokens of the prompt that are read at a time; for --inference."""
    batch_size: int = 8
    """Sequences in one forward pass, of all processes together."""
    context: int = 2048
    """Tokens in a sequence."""
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    """Dtype of autocast; with --inference of everything."""
    checkpointing: bool = False
    """Activation checkpointing: recompute each Transformer block in the backward pass instead of keeping it."""
    json: bool = False
    """Print JSON instead of a table."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """How the run is split over processes."""
    config: Path | None = None
    """YAML file with any of these settings; flags win over it."""
    preset: flags.PresetName = None
    model: DecoderShape = field(default_factory=DecoderShape)
    """Shape of the model."""
    residual: ResidualFlags = field(default_factory=ResidualFlags)
    """Residual connection and its options."""


def run(argv: Sequence[str]) -> int:
    file = flags.peek(argv, "config")["config"]
    shape = flags.peek([*flags.of_file(file, PlanFlags), *argv], "preset")["preset"] or "tiny"
    given = flags.parse(PlanFlags, argv, "plan", PlanFlags(model=flags.open_shape(preset(shape))), file)
    options = flags.options_for(given.residual.name, flags.chosen_options(given.residual), given.preset)
    model = DecoderConfig(**asdict(given.model), residual=given.residual.name, residual_options=options)
    dtype = getattr(torch, given.precision)
    if given.inference:
        steps = inference_steps(model, given, dtype)
        as_json = json.dumps([step.to_dict() for step in steps], indent=1)
        print(as_json if given.json else inference_table(steps, model, given))
        return 0
    if given.prefill_chunk is not None:
        raise UsageError("prefill_chunk is for inference; add --inference, or leave it out")
    found = plan(model, given.parallel, given.batch_size, given.context, dtype, given.checkpointing, given)
    print(json.dumps(found.to_dict(), indent=1) if given.json else table(found, given))
    return 0


def inference_steps(model: DecoderConfig, given: PlanFlags, precision: torch.dtype) -> list[InferencePlan]:
    """At once in one process, then over all of them, then in chunks as well; without the steps that change nothing."""
    split = given.parallel
    for name in ("dp", "shard", "ep", "pp"):
        if getattr(split, name) > 1:
            raise UsageError(
                f"parallel.{name} is for training, and is {getattr(split, name)}; inference is planned over parallel.tp"
            )
    if given.checkpointing:
        raise UsageError("checkpointing is for training, where activations are kept; leave it out with --inference")
    chunk = given.prefill_chunk if (given.prefill_chunk or 0) < given.context else None
    ways = dict.fromkeys([(1, None), (split.tp, None), (split.tp, chunk)])
    return [plan_inference(model, given.batch_size, given.context, tp, tokens, precision) for tp, tokens in ways]


def inference_table(steps: list[InferencePlan], model: DecoderConfig, cluster: PlanFlags) -> str:
    """Memory of one process, a line for each way of reading the prompt, gigabytes of 10^9."""
    blocks = None if steps[0].block_bytes is None else model.build_residual().num_blocks
    heads = ["weights", "cache", f"{blocks} blocks", "over depth", "one layer", "total GB"]
    rows = [["processes", "tokens at a time", *heads, ""]]
    for step in steps:
        sizes: list[int | None] = [step.weight_bytes, step.cache_bytes, step.block_bytes]
        sizes += [step.state_bytes, step.working_bytes, step.total_bytes]
        fits = "fits" if step.total_bytes <= cluster.usable_bytes else "too much"
        cells = ["" if size is None else f"{size / 1e9:.3g}" for size in sizes]
        rows.append([str(step.processes), f"{step.tokens:,}", *cells, fits])
    if blocks is None:
        rows = [[*row[:4], *row[5:]] for row in rows]
    meaning = ": the blocks, the embedding and, read in two phases, results for the layers ahead" if blocks else ""
    lines = [
        f"{_short(steps[0].parameters)} parameters of width {model.hidden_size}; {cluster.batch_size} x "
        f"{cluster.context:,} tokens in {cluster.precision}; memory of one process at the end of the prompt",
        "",
        *_columns(rows),
        "",
        f"over depth is the most that the residual connection keeps{meaning}",
        f"a device has {cluster.memory_gb:g} GB less {cluster.reserve_gb:g} in reserve",
    ]
    return "\n".join(lines)


def table(found: Plan, cluster: Cluster) -> str:
    """A plan in plain columns, gigabytes of 10^9."""
    lines = [
        f"{_short(found.model_parameters)} parameters on {found.world_size} processes; a step is {found.microbatches} "
        f"micro-batches of {found.rows} x {found.context} tokens in each replica, {found.tokens_per_step:,} in all",
        "",
        *_columns(_rank_rows(found.ranks)),
        "",
    ]
    if found.hops:
        lines += [*_columns(_hop_rows(found, cluster)), ""]
    return "\n".join([*lines, *_summary(found, cluster)])


RANK_HEADS = (
    "rank",
    "layers",
    "parameters",
    "weights",
    "gathered",
    "gradients",
    "AdamW",
    "activations",
    "blocks",
    "one pass",
    "total GB",
    "in flight",
    "",
)


def _rank_rows(ranks: list[RankPlan]) -> list[list[str]]:
    rows = [list(RANK_HEADS)]
    for rank in _shown(ranks):
        sizes = (
            rank.parameter_bytes,
            rank.gathered_bytes,
            rank.gradient_bytes,
            rank.optimizer_bytes,
            rank.activation_bytes,
            rank.history_bytes,
            rank.working_bytes,
            rank.total_bytes,
        )
        rows.append(
            [
                str(rank.rank),
                " ".join(f"{first}-{end - 1}" for first, end in rank.layers),
                _short(rank.parameters),
                *(f"{size / 1e9:.3g}" for size in sizes),
                " ".join(map(str, rank.in_flight)),
                "fits" if rank.fits else "too much",
            ]
        )
    return rows


def _shown(ranks: list[RankPlan]) -> list[RankPlan]:
    """All of a few; of many the ends and those with the least and the most memory."""
    by_memory = sorted(ranks, key=lambda rank: rank.total_bytes)
    chosen = {0, 1, len(ranks) // 2, by_memory[0].rank, by_memory[-1].rank, len(ranks) - 1}
    return [rank for rank in ranks if len(ranks) <= 8 or rank.rank in chosen]


def _hop_rows(found: Plan, cluster: Cluster) -> list[list[str]]:
    rows = [["bytes per token", "largest hop", "all hops", "largest, ms"]]
    for name, field_name in (
        ("whole history", "naive_bytes"),
        ("paper's cache", "paper_bytes"),
        ("sent", "sent_bytes"),
    ):
        sizes = [getattr(hop, field_name) for hop in found.hops]
        largest, total = max(sizes) / found.hop_tokens, sum(sizes) / found.hop_tokens
        rows.append([name, f"{largest:,.0f}", f"{total:,.0f}", f"{1e3 * cluster.hop_seconds(max(sizes)):.3g}"])
    return rows


def _summary(found: Plan, cluster: Cluster) -> list[str]:
    lines = []
    if found.hops:
        passes = [hop.compute_seconds for hop in found.hops]
        lines.append(
            f"a chunk's forward pass of a micro-batch: {1e3 * sum(passes) / len(passes):.3g} ms; hops carry the same "
            f"bytes back; bubble {found.bubble:.1%} with equal chunks"
        )
    step = f"step {found.step_seconds:.3g} s at {cluster.mfu:.0%} of {cluster.peak_tflops:g} TFLOP/s"
    if found.hops:
        step += f" and {cluster.link_gbs:g} GB/s a hop; {found.naive_step_seconds:.3g} s with the whole history"
    lines.append(f"{step} (assumed rates; collectives and the optimizer left out)")
    most = max(rank.total_bytes for rank in found.ranks) / 1e9
    verdict = "fits" if found.fits else "does not fit"
    lines.append(f"{verdict}: {most:.1f} GB of {cluster.memory_gb:g} less {cluster.reserve_gb:g} in reserve")
    return lines


def _short(count: float) -> str:
    power = max(0, min(4, (len(str(int(count))) - 1) // 3))
    return f"{count / 1000**power:.4g}{('', 'K', 'M', 'B', 'T')[power]}"


def _columns(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
