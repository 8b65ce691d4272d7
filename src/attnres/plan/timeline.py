"""The order of a pipeline's passes on every rank, and when each would begin and end: no process, no tensor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

from torch.distributed.pipelining import schedules

from ..parallel.config import ONE_STAGE, ParallelConfig

Kind = Literal["forward", "backward", "input", "weight"]


class Pass(NamedTuple):
    """One chunk's work on one micro-batch.

    kind: "forward"; "backward", all of it; or its two parts: "input", the gradients that the chunk before waits for,
    and "weight", those of the parameters.
    """

    kind: Kind
    chunk: int
    micro_batch: int


def orders(parallel: ParallelConfig) -> list[list[Pass]]:
    """The passes of every rank of the pipeline in the order in which it runs them."""
    count = parallel.microbatch_count
    if parallel.schedule == "GPipe" or parallel.pp == 1:
        return [
            [Pass(kind, c, m) for kind in ("forward", "backward") for m in range(count)] for c in range(parallel.pp)
        ]
    if parallel.schedule == "1F1B":  # torch's own list begins with micro-batch 1 on the last rank; it does not run it
        return [_one_forward_one_backward(c, min(parallel.pp - c, count), count) for c in range(parallel.pp)]
    actions = _schedule(parallel).pipeline_order
    return [[done for action in actions[rank] if action for done in _passes(action)] for rank in range(parallel.pp)]


def _one_forward_one_backward(chunk: int, warmup: int, count: int) -> list[Pass]:
    passes = [Pass("forward", chunk, m) for m in range(warmup)]
    for m in range(count):
        passes.append(Pass("backward", chunk, m))
        if m + warmup < count:
            passes.append(Pass("forward", chunk, m + warmup))
    return passes


def _schedule(parallel: ParallelConfig) -> Any:
    """torch's schedule over stages that only know their number."""
    assert parallel.schedule not in ONE_STAGE
    stages: list[Any] = [
        SimpleNamespace(stage_index=i, num_stages=parallel.chunks, group_size=parallel.pp, group_rank=0, submod=None)
        for i in range(parallel.virtual_stages)
    ]
    return schedules.get_schedule_class(parallel.schedule)(stages, parallel.microbatch_count)  # type: ignore[arg-type]


_KINDS: dict[str, Kind] = {"F": "forward", "B": "backward", "I": "input", "W": "weight"}


def _passes(action: Any) -> list[Pass]:
    if action.sub_actions:  # a forward and a backward pass that may overlap
        return [done for part in action.sub_actions for done in _passes(part)]
    kind = action.computation_type.value
    return [Pass(_KINDS[kind], action.stage_index, action.microbatch_index)] if kind in _KINDS else []


def duration(
    ranks: Sequence[Sequence[Pass]], seconds: Callable[[Pass], float], hop: Callable[[int], float] = lambda chunk: 0.0
) -> float:
    """How long the passes of all ranks take together.

    A rank runs its passes one after the other, each as soon as what it needs has arrived. seconds: of a pass. hop:
    seconds from chunk c to c + 1 and as many back, during which both ranks go on.
    """
    last = max(done.chunk for rank in ranks for done in rank)
    ends: dict[tuple[bool, int, int], float] = {}  # forward or not, chunk, micro-batch
    clocks, positions = [0.0] * len(ranks), [0] * len(ranks)
    waiting = set(range(len(ranks)))
    while waiting:
        moved = False
        for rank in sorted(waiting):
            while positions[rank] < len(ranks[rank]):
                kind, chunk, micro_batch = done = ranks[rank][positions[rank]]
                begin = clocks[rank]
                forward = kind == "forward"
                if kind != "weight" and chunk != (0 if forward else last):
                    before = ends.get((forward, chunk - 1 if forward else chunk + 1, micro_batch))
                    if before is None:
                        break
                    begin = max(begin, before + hop(chunk - 1 if forward else chunk))
                clocks[rank] = begin + seconds(done)
                if kind != "weight":
                    ends[forward, chunk, micro_batch] = clocks[rank]
                positions[rank] += 1
                moved = True
            else:
                waiting.discard(rank)
        assert moved, "the schedule waits for itself"
    return max(clocks)


def bubble(ranks: Sequence[Sequence[Pass]]) -> float:
    """The share of the time in which a rank waits, if chunks are equal, a backward pass takes twice as long as a
    forward pass, and hops take no time."""
    cost = {"forward": 1.0, "backward": 2.0, "input": 1.0, "weight": 1.0}
    busy = max(sum(cost[done.kind] for done in rank) for rank in ranks)
    return 1 - busy / duration(ranks, lambda done: cost[done.kind])
