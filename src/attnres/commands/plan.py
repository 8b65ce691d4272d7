"""attnres plan"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..data.tokenizer import load_tokenizer
from ..errors import UsageError
from ..plan.prompt import InferencePlan, plan_inference
from ..plan.rank import RankPlan
from ..plan.training import Cluster, Plan, plan
from ..run import hardware
from ..run.config import TrainConfig
from ..run.folder import read_config
from ..text_table import columns
from . import flags
from .fields import POSITIONAL
from .train import TrainFlags


@dataclass
class PlanFlags(TrainFlags):
    """Say what training on many processes would take, without starting one: memory and parameters of every rank, bytes
    of every pipeline hop, the pipeline's bubble, and whether it fits. Parameters and bytes on the wire are exact; times
    follow from the rates given here. JSON has every hop; the table sums them up. With --inference: what reading a
    prompt takes of a process's memory, at once, over the processes of --parallel.tp, and in chunks.

    The run is that of a folder, or the one that `attnres train` would start with the same flags.
    """

    run: Path | None = field(default=None, metadata=POSITIONAL)
    """Folder of a run, whose settings are the defaults."""
    inference: bool = False
    """Plan reading a prompt of --context tokens, not training."""
    prefill_chunk: int | None = None
    """Tokens of the prompt that are read at a time; for --inference."""
    json: bool = False
    """Print JSON instead of a table."""


def run(argv: Sequence[str]) -> int:
    given = flags.parse("plan", argv, TrainConfig, Cluster, PlanFlags, start=_start)
    planned = given.train(*given.residual()).with_vocabulary(_vocabulary(given["tokenizer"]))
    cluster = given.make(Cluster)
    precision = torch.float32 if planned.precision == "float32" else torch.bfloat16
    if given["inference"]:
        steps = inference_steps(planned, given["prefill_chunk"], precision)
        as_json = json.dumps([step.to_dict() for step in steps], indent=1)
        print(as_json if given["json"] else inference_table(steps, planned, cluster, precision))
        return 0
    if given["prefill_chunk"] is not None:
        raise UsageError("prefill_chunk is for inference; add --inference, or leave it out")
    sizes = (planned.batch_size, planned.context, precision, planned.checkpointing)
    found, passes = plan(planned.model, planned.parallel, *sizes, cluster), planned.accumulate
    found = dataclasses.replace(
        found,
        microbatches=passes * found.microbatches,
        tokens_per_step=passes * found.tokens_per_step,
        step_seconds=passes * found.step_seconds,
        naive_step_seconds=passes * found.naive_step_seconds,
    )
    print(json.dumps(found.to_dict(), indent=1) if given["json"] else table(found, cluster))
    return 0


def _start(given: flags.Values) -> flags.Values:
    """The settings of a run's folder, or of a preset; made for a longer context than theirs if need be."""
    folder = given.get("run") or (given.get("out", TrainConfig.out) if given.get("resume") else None)
    values = flags.of_preset(given) if folder is None or given.get("preset") else {}
    if folder is not None:
        values = {**flags.values_of(read_config(folder)), "tokenizer": "bytes", **values}
    context = given.get("context", values.get("context", TrainConfig.context))
    for name in ("model.max_position_embeddings", "validation_tokens"):
        values[name] = max(values.get(name, TrainConfig.validation_tokens), context)
    return values


def _vocabulary(tokenizer: str) -> int:
    size = tokenizer.removeprefix("train:")
    if size != tokenizer and size.isdecimal() and int(size) > 256:  # what is to be learned needs no text here
        return int(size)
    return load_tokenizer(tokenizer, None, "").vocab_size


def inference_steps(run: TrainConfig, prefill_chunk: int | None, precision: torch.dtype) -> list[InferencePlan]:
    """At once in one process, then over all of them, then in chunks as well; without the steps that change nothing."""
    split = run.parallel
    for name in ("dp", "shard", "ep", "pp"):
        if getattr(split, name) > 1:
            raise UsageError(
                f"parallel.{name} is for training, and is {getattr(split, name)}; inference is planned over parallel.tp"
            )
    if run.checkpointing:
        raise UsageError("checkpointing is for training, where activations are kept; leave it out with --inference")
    chunk = prefill_chunk if (prefill_chunk or 0) < run.context else None
    ways = dict.fromkeys([(1, None), (split.tp, None), (split.tp, chunk)])
    return [plan_inference(run.model, run.batch_size, run.context, tp, tokens, precision) for tp, tokens in ways]


def inference_table(steps: list[InferencePlan], run: TrainConfig, cluster: Cluster, precision: torch.dtype) -> str:
    """Memory of one process, a line for each way of reading the prompt, gigabytes of 10^9."""
    blocks = None if steps[0].block_bytes is None else run.model.build_residual().num_blocks
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
        f"{_short(steps[0].parameters)} parameters of width {run.model.hidden_size}; {run.batch_size} x "
        f"{run.context:,} tokens in {hardware.name_of(precision)}; memory of one process at the end of the prompt",
        "",
        *columns(rows),
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
        *columns(_rank_rows(found.ranks)),
        "",
    ]
    if found.hops:
        lines += [*columns(_hop_rows(found, cluster)), ""]
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
