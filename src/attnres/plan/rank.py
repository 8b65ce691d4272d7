"""The memory of one rank of a pipeline over a step, by walking its passes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..model import DecoderConfig
from ..model.layer import Layer, layers_of
from ..parallel.config import ParallelConfig
from ..parallel.fsdp import transformer_blocks
from ..parallel.part import ModelPart
from ..parallel.pipeline import Layout
from .kept import Footprint
from .timeline import Pass

STATE_BYTES = 4
"""Of an element of a parameter, of its gradient, and of either mean of AdamW."""


@dataclass
class RankPlan:
    """One rank of the pipeline: that of its processes which holds most.

    layers: first and last + 1 of each chunk. parameters: elements held. gathered_bytes: of the whole parameters that
    FSDP has while it works. in_flight: the most micro-batches that each chunk keeps at once. activation_bytes: their
    peak. store_tensors: the most that lie in the store of the rank's chunks at once (`stage.Store.peak`).
    history_bytes: peak of the residual state's tensors that the rank received or made, each once a micro-batch, and of
    the gradients that wait for them. working_bytes: the most of a single pass. total_bytes: the peak of all together.
    """

    rank: int
    layers: list[tuple[int, int]]
    parameters: int
    parameter_bytes: int
    gathered_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    in_flight: list[int]
    activation_bytes: int
    store_tensors: int
    history_bytes: int
    working_bytes: int
    total_bytes: int
    fits: bool


class Peak:
    """What a rank holds beside its parameters, pass after pass, and the most it held.

    Follows the passes of one rank. `in_flight` counts by chunk; `store` in tensors; the others in bytes, as in
    `RankPlan`, and `total` is the most of activations, history and working memory together.
    """

    def __init__(self, layout: Layout, sizes: list[Footprint]) -> None:
        self._layout, self._sizes = layout, sizes
        self._in_flight: Counter[int] = Counter()
        self._activations = self._history = 0
        self._store: dict[int, int] = {}
        self._deposits: set[tuple[int, str]] = set()
        self.in_flight: Counter[int] = Counter()
        self.activations = self.history = self.working = self.store = self.total = 0

    def follow(self, done: Pass) -> None:
        route = self._layout.routes[done.chunk]
        if done.kind == "forward":
            self._keep(done.chunk, +1)
            self._store[done.micro_batch] = self._store.get(done.micro_batch, 0) + len(route.kept)
            self.store = max(self.store, sum(self._store.values()))
            if route.last:
                del self._store[done.micro_batch]
        elif done.kind != "weight":
            self._deposit(done)
        working = self._sizes[done.chunk].working
        if done.kind in ("backward", "input"):
            working += self._bytes(route.received) + self._bytes(route.sent)  # gradients on their way
        self.working = max(self.working, working)
        self.activations = max(self.activations, self._activations)
        self.history = max(self.history, self._history)
        self.total = max(self.total, self._activations + self._history + working)
        if done.kind in ("backward", "weight"):
            self._keep(done.chunk, -1)

    def _keep(self, chunk: int, count: int) -> None:
        route, ranks = self._layout.routes[chunk], self._layout.ranks
        self._in_flight[chunk] += count
        self.in_flight[chunk] = max(self.in_flight[chunk], self._in_flight[chunk])
        self._activations += count * self._sizes[chunk].kept
        is_handed_on = chunk > 0 and ranks[chunk - 1] == ranks[chunk]  # and the chunk before keeps it
        self._history += count * self._bytes(route.made if is_handed_on else (*route.received, *route.made))

    def _deposit(self, done: Pass) -> None:
        """The gradients of what the chunk took from the store wait there for the chunk that put it in."""
        route = self._layout.routes[done.chunk]
        for key in ((done.micro_batch, name) for name in route.cached):
            if key not in self._deposits:
                self._deposits.add(key)
                self._history += self._bytes(key[1:])
        for key in ((done.micro_batch, name) for name in route.kept):
            self._deposits.remove(key)
            self._history -= self._bytes(key[1:])

    def _bytes(self, names: Iterable[str]) -> int:
        return sum(self._layout.like[name].nbytes for name in names)


def plan_rank(
    rank: int,
    config: DecoderConfig,
    parallel: ParallelConfig,
    layout: Layout,
    model: ModelPart,
    sizes: list[Footprint],
    order: list[Pass],
    usable_bytes: float,
) -> RankPlan:
    """The memory of a rank: its parameters under AdamW and, along the passes `order`, its activations.

    model: one tp and ep process's share of the whole; sizes: of all chunks.
    """
    own = layout.on_rank(rank)
    ranges = [(layout.cuts[c], layout.cuts[c + 1]) for c in own]
    parts = [_chunk_parameters(config, model, first, last) for first, last in ranges]
    full = sum(p.numel() for part in parts for p in part)
    experts = {getattr(layer, name) for layer in layers_of(model) for name in layer.experts}
    copies, sharers = parallel.expert_replicas
    held = sum(_rows(p, sharers if p in experts else parallel.shard) for part in parts for p in part)
    alone = experts if parallel.ep > 1 and copies * sharers == 1 else set()  # which FSDP has nothing to do with
    gathered, gradients = 0, held
    if parallel.dp * parallel.shard > 1 and parallel.pp > 1:
        gradients = full  # gathered once a step, and reduced at its end
        gathered = full - sum(p.numel() for part in parts for p in part if p in alone)
    elif parallel.dp * parallel.shard > 1:
        blocks = [
            sum(p.numel() for b in block for p in _matrices(b) if p not in alone)
            for block in transformer_blocks(layers_of(model))
        ]
        rest = full - sum(p.numel() for p in alone) - sum(blocks)
        gathered = rest + 3 * max(blocks)  # this block, the next one, and this one's gradients
    peak = Peak(layout, sizes)
    for done in order:
        peak.follow(done)
    total = STATE_BYTES * (held + gathered + gradients + 2 * held) + peak.total
    return RankPlan(
        rank=rank,
        layers=ranges,
        parameters=held,
        parameter_bytes=STATE_BYTES * held,
        gathered_bytes=STATE_BYTES * gathered,
        gradient_bytes=STATE_BYTES * gradients,
        optimizer_bytes=2 * STATE_BYTES * held,
        in_flight=[peak.in_flight[c] for c in own],
        activation_bytes=peak.activations,
        store_tensors=peak.store,
        history_bytes=peak.history,
        working_bytes=peak.working,
        total_bytes=total,
        fits=total <= usable_bytes,
    )


def _chunk_parameters(config: DecoderConfig, model: ModelPart, first: int, last: int) -> list[Tensor]:
    with torch.device("meta"):
        residual = config.build_residual()
    residual.keep_layers(first, last)
    found: list[Tensor] = [*residual.parameters(), *model.layers[first:last].parameters()]
    if first == 0:
        found.append(model.embed_tokens.weight)
    if last == config.num_layers:
        found += model.norm.parameters()
        if not (first == 0 and config.tie_word_embeddings):
            found.append(model.lm_head.weight)
    return found


def _matrices(layer: Layer) -> list[Tensor]:
    """Its parameters but for the input norm's, which stays gathered."""
    norm = set(layer.norm.parameters())
    return [parameter for parameter in layer.parameters() if parameter not in norm]


def _rows(parameter: Tensor, shard: int) -> int:
    """Elements that the first of `shard` processes holds: rows are dealt out in equal parts, the last ones shorter."""
    return -(-parameter.shape[0] // shard) * math.prod(parameter.shape[1:]) if parameter.dim() else 1
