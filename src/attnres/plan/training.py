"""What a split of a model over processes would cost, without starting one: memory, traffic, time, and whether it fits.

Parameters and bytes on the wire are exact. What is kept for the backward pass is found by running the model on tensors
without data (`footprint`), and how many micro-batches keep it at once by walking the schedule (`timeline`). Times are
operations over an assumed rate and bytes over an assumed bandwidth: a floor, not a measurement. Left out of them are
the collectives of tensor and expert parallelism and of sharding, latencies, the optimizer, and the loading of data.
"""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import UsageError
from ..model import DecoderConfig
from ..model.layer import layers_of
from ..parallel.config import V_SHAPED, ParallelConfig
from ..parallel.part import ModelPart
from ..parallel.pipeline import Layout
from . import timeline
from .kept import footprints, keep_experts, share
from .rank import RankPlan, plan_rank


@dataclass
class Cluster:
    """What a device can do, and the wire between two of them; the defaults are an NVIDIA H100 SXM's and 400 Gb/s."""

    memory_gb: float = 80.0
    """Memory of a device, in 10^9 bytes."""
    reserve_gb: float = 4.0
    """Of that, what no tensor gets, in 10^9 bytes: the driver, communication buffers, gaps between allocations."""
    peak_tflops: float = 989.0
    """Arithmetic rate of a device in the run's precision, in 10^12 operations a second (dense, from its data sheet)."""
    mfu: float = 0.4
    """Share of that rate that the model's operations reach while a device is busy."""
    link_gbs: float = 50.0
    """Bandwidth of a pipeline hop between two processes, in 10^9 bytes a second and direction."""

    def __post_init__(self) -> None:
        for name in ("memory_gb", "peak_tflops", "mfu", "link_gbs"):
            if not getattr(self, name) > 0:
                raise UsageError(f"{name} must be positive; it is {getattr(self, name)}")
        if not 0 <= self.reserve_gb < self.memory_gb:
            raise UsageError(f"reserve_gb must be from 0 to below memory_gb, {self.memory_gb}; it is {self.reserve_gb}")

    @property
    def usable_bytes(self) -> float:
        return (self.memory_gb - self.reserve_gb) * 1e9

    def compute_seconds(self, operations: float) -> float:
        return operations / (self.peak_tflops * 1e12 * self.mfu)

    def hop_seconds(self, size: int) -> float:
        return size / (self.link_gbs * 1e9)


@dataclass
class HopPlan:
    """From one chunk to the next. Bytes of one micro-batch on one process, forward, and backward as many.

    naive: the whole residual state; paper: without what the rank has received before; sent: by this run. seconds: of
    sent; compute_seconds: of the receiving chunk's forward pass.
    """

    source: int
    target: int
    naive_bytes: int
    paper_bytes: int
    sent_bytes: int
    seconds: float
    compute_seconds: float


@dataclass
class Plan:
    """What `plan` found.

    paper_formula_bytes: of the paper's closed form over all hops (section 5, with the embedding's own hops; None for
    schedules that it does not cover). bubble: share of the time in which a rank waits, with equal chunks, a backward
    pass as long as two forward passes, and hops that take no time. step_seconds: with the chunks and hops that there
    are; naive_step_seconds: if every hop carried the whole state.
    """

    world_size: int
    model_parameters: int
    rows: int
    context: int
    microbatches: int
    tokens_per_step: int
    hop_tokens: int
    hops: list[HopPlan]
    paper_formula_bytes: float | None
    bubble: float
    step_seconds: float
    naive_step_seconds: float
    ranks: list[RankPlan]
    fits: bool

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def plan(
    config: DecoderConfig,
    parallel: ParallelConfig,
    batch_size: int,
    context: int,
    precision: torch.dtype = torch.bfloat16,
    checkpointing: bool = False,
    cluster: Cluster | None = None,
) -> Plan:
    """Plans one optimizer step of one batch under AdamW, with parameters, gradients and its state in fp32.

    Args:
        batch_size: sequences in one batch of the whole job; context: tokens in each.
        precision: bfloat16 for autocast to it, or float32.
        checkpointing: recompute Transformer blocks in the backward pass.

    Raises UsageError, with the sums, for a split that cannot work.
    """
    cluster = cluster or Cluster()
    parallel.check(parallel.world_size, config, batch_size, context, checkpointing)
    rows = batch_size // (parallel.dp * parallel.shard * parallel.microbatch_count)
    shape = (rows, context // parallel.tp, config.hidden_size)
    layout = Layout(config, parallel, shape, precision)
    orders = timeline.orders(parallel)
    with torch.device("meta"):
        model = ModelPart(share(config, parallel.tp), 0, config.num_layers, context)
        keep_experts(model, parallel.ep)
        whole = ModelPart(config, 0, config.num_layers, context)
    sizes = footprints(config, layout.cuts, shape, precision, parallel.tp, checkpointing, parallel.ep)
    seconds = [
        cluster.compute_seconds(operations * rows * context / parallel.tp)
        for operations in chunk_flops(config, whole, layout.cuts, context)
    ]
    ranks = [
        plan_rank(rank, config, parallel, layout, model, sizes, orders[rank], cluster.usable_bytes)
        for rank in range(parallel.pp)
    ]
    hops = _hops(layout, cluster, seconds)

    def step(sizes: list[int]) -> float:
        times = {"forward": 1, "backward": 3 if checkpointing else 2, "input": 1, "weight": 1}
        return timeline.duration(
            orders, lambda done: times[done.kind] * seconds[done.chunk], lambda chunk: cluster.hop_seconds(sizes[chunk])
        )

    return Plan(
        world_size=parallel.world_size,
        model_parameters=sum(parameter.numel() for parameter in whole.parameters()),
        rows=rows,
        context=context,
        microbatches=parallel.microbatch_count,
        tokens_per_step=batch_size * context,
        hop_tokens=rows * context // parallel.tp,
        hops=hops,
        paper_formula_bytes=_paper_formula(layout, parallel),
        bubble=timeline.bubble(orders),
        step_seconds=step([hop.sent_bytes for hop in hops]),
        naive_step_seconds=step([hop.naive_bytes for hop in hops]),
        ranks=ranks,
        fits=all(rank.fits for rank in ranks),
    )


def chunk_flops(config: DecoderConfig, model: ModelPart, cuts: list[int], context: int) -> list[float]:
    """Forward operations per token of every chunk of the whole `model`, counted as in `model.accounting`."""
    found = []
    for first, last in itertools.pairwise(cuts):
        is_last = last == config.num_layers
        found.append(
            sum(layer.flops(context) for layer in layers_of(model)[first:last])
            + is_last * 2 * model.lm_head.weight.numel()
            + sum(model.residual.read_flops(layer) for layer in range(first, last + is_last))
        )
    return found


def _hops(layout: Layout, cluster: Cluster, seconds: list[float]) -> list[HopPlan]:
    """seconds: of every chunk's forward pass."""
    received: dict[int, set[str]] = {rank: set() for rank in layout.ranks}
    hops = []
    for source, sent in enumerate(layout.hop_bytes()):
        target = source + 1
        names = layout.borders[source].names
        lacking = [name for name in names if name not in received[layout.ranks[target]]]
        received[layout.ranks[target]].update(lacking)
        leaves_rank = layout.ranks[source] != layout.ranks[target]
        hops.append(
            HopPlan(
                source=source,
                target=target,
                naive_bytes=leaves_rank * sum(layout.like[name].nbytes for name in names),
                paper_bytes=leaves_rank * sum(layout.like[name].nbytes for name in lacking),
                sent_bytes=sent,
                seconds=cluster.hop_seconds(sent),
                compute_seconds=seconds[target],
            )
        )
    return hops


def _paper_formula(layout: Layout, parallel: ParallelConfig) -> float | None:
    """P(P-1)/2 + (V-1)P^2 times the blocks that a chunk makes, and the embedding in the first P hops, in bytes."""
    ranks, chunks, stages = parallel.pp, parallel.chunks, parallel.virtual_stages
    if parallel.schedule in V_SHAPED or ranks == 1:
        return None
    last = layout.borders[-1].names
    made = (len(last) - 1) / (chunks - 1)
    tensors = made * (ranks * (ranks - 1) / 2 + (stages - 1) * ranks**2) + min(ranks, chunks - 1)
    return tensors * layout.like[last[0]].nbytes
