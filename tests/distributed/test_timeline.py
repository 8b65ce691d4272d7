"""The walk through a schedule against what real ranks do, and against the closed forms of its bubble."""

from typing import Any

import pytest
import torch

from attnres.parallel import mesh as meshes
from attnres.parallel import pipeline
from attnres.parallel.build import build_parts
from attnres.parallel.config import ParallelConfig
from attnres.parallel.pipeline import Layout
from attnres.plan import timeline

from .plans import FP32, shape
from .versions import trusted


def performed(case: dict[str, Any]) -> list[tuple[str, int, int]]:
    """What this rank's stages were told to do in a step."""
    parallel, cpu = ParallelConfig(**case), torch.device("cpu")
    count, mesh = parallel.microbatch_count, meshes.build(parallel, cpu)
    layout = Layout(shape(), parallel, (1, 4, 16), FP32)
    parts = build_parts(shape(), layout, mesh, cpu, 4, seed=0)
    line = pipeline.Pipeline(parts, layout, parallel, mesh, cpu, count, 4, lambda logits, targets: logits.sum())
    passes = []
    for stage in line.stages:
        forward, backward, weight = stage.forward_one_chunk, stage.backward_one_chunk, stage.backward_weight_one_chunk

        def run_forward(m, *args, _stage=stage, _run=forward, **kwargs):
            passes.append(("forward", _stage.stage_index, m))
            return _run(m, *args, **kwargs)

        def run_backward(m, *args, _stage=stage, _run=backward, **kwargs):
            passes.append(("backward" if kwargs.get("full_backward", True) else "input", _stage.stage_index, m))
            return _run(m, *args, **kwargs)

        def run_weight(m, *args, _stage=stage, _run=weight, **kwargs):
            passes.append(("weight", _stage.stage_index, m))
            return _run(m, *args, **kwargs)

        stage.forward_one_chunk, stage.backward_one_chunk = run_forward, run_backward
        stage.backward_weight_one_chunk = run_weight
    line.train(*torch.zeros(2, count, 4, dtype=torch.int64))
    return passes


@pytest.mark.parametrize(
    ("schedule", "stages", "count"),
    [
        ("GPipe", 1, 5),
        ("1F1B", 1, 6),
        ("Interleaved1F1B", 2, 8),
        ("LoopedBFS", 2, 3),
        ("InterleavedZeroBubble", 2, 8),
        ("ZBVZeroBubble", 2, 8),
        ("DualPipeV", 2, 8),
    ],
)
def test_the_walk_is_what_ranks_do(world, schedule, stages, count):
    if not trusted(schedule):
        pytest.skip("a schedule that is refused on this version of torch")
    case = {"pp": 4, "virtual_stages": stages, "schedule": schedule, "microbatches": count}
    for done, planned in zip(world(4).run(performed, case), timeline.orders(ParallelConfig(**case)), strict=True):
        assert done == [tuple(one) for one in planned]


@pytest.mark.parametrize(("schedule", "stages"), [("GPipe", 1), ("1F1B", 1), ("Interleaved1F1B", 3), ("LoopedBFS", 2)])
def test_the_bubble_is_the_textbook_one(schedule, stages):
    orders = timeline.orders(ParallelConfig(pp=4, virtual_stages=stages, schedule=schedule, microbatches=12))
    assert timeline.bubble(orders) == pytest.approx(3 / (12 * stages + 3))


def test_a_split_backward_pass_fills_the_bubble():
    case = {"pp": 4, "virtual_stages": 2, "microbatches": 12}
    whole = timeline.bubble(timeline.orders(ParallelConfig(**case, schedule="Interleaved1F1B")))
    for schedule in ("InterleavedZeroBubble", "ZBVZeroBubble"):
        assert timeline.bubble(timeline.orders(ParallelConfig(**case, schedule=schedule))) < whole / 2


def test_a_hop_delays_only_who_waits_for_it():
    def both(schedule: str) -> tuple[float, float]:
        orders = timeline.orders(ParallelConfig(pp=2, schedule=schedule, microbatches=3))
        return timeline.duration(orders, lambda done: 1.0), timeline.duration(orders, lambda done: 1.0, lambda _: 0.5)

    assert both("GPipe") == (8, 8 + 2 * 0.5)  # there for the first micro-batch, back for the last
    assert both("1F1B") == (8, 8 + 4 * 0.5)  # there and back for both of these
