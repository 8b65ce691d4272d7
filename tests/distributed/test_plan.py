"""The cost model against what real chunks, real schedules and real processes do."""

import json
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from attnres import residual
from attnres.parallel import mesh as meshes
from attnres.parallel import pipeline
from attnres.parallel.build import build_parts
from attnres.parallel.config import ParallelConfig
from attnres.parallel.part import ModelPart
from attnres.parallel.pipeline import Layout
from attnres.plan.kept import footprints
from attnres.plan.rank import RankPlan
from attnres.plan.training import Cluster, chunk_flops, plan

from . import pipelines
from .plans import BF16, FP32, TWO_ROUNDS, shape
from .versions import V_SHAPED

# bytes on the wire


@pytest.mark.parametrize(
    ("stages", "made", "naive", "paper", "ours"),
    [(2, 1, 35, 26, 21), (2, 2, 63, 48, 39), (4, 1, 135, 58, 45), (1, 1, 9, 9, 9)],
)
def test_hops_follow_the_closed_forms(stages, made, naive, paper, ours):
    layers = 4 * stages * made
    config = shape(layers=layers, residual_options={"num_blocks": layers})
    parallel = ParallelConfig(
        **{**TWO_ROUNDS, "virtual_stages": stages} if stages > 1 else {"pp": 4, "microbatches": 8}
    )
    found = plan(config, parallel, batch_size=8, context=4)
    unit = 4 * 16 * 2  # tokens, width, bfloat16
    assert sum(hop.naive_bytes for hop in found.hops) == naive * unit
    assert sum(hop.paper_bytes for hop in found.hops) == paper * unit == found.paper_formula_bytes
    assert sum(hop.sent_bytes for hop in found.hops) == ours * unit


STEPS = 1
REAL = [
    {"parallel": {"pp": 4, "microbatches": 6}},
    {"parallel": TWO_ROUNDS, "model": {"block_size": 5}},
    {"parallel": {**TWO_ROUNDS, "pipeline_cache": "off"}},
    {"parallel": {**TWO_ROUNDS, "schedule": "LoopedBFS", "microbatches": 3}, "model": {"residual": "full_attnres"}},
    {"parallel": {"pp": 4, "virtual_stages": 2, "schedule": V_SHAPED, "microbatches": 8}},
    {"parallel": TWO_ROUNDS, "model": {"residual": "prenorm"}},
]


def test_bytes_and_store_are_those_of_four_processes(world):
    cases = [{**case, "steps": STEPS} for case in REAL]
    for case, ranks in zip(cases, zip(*world(4).run(pipelines.compare_all, cases), strict=True), strict=True):
        parallel = ParallelConfig(**case["parallel"])
        config = pipelines.shape(**case.get("model", {}))
        found = plan(config, parallel, parallel.microbatch_count, pipelines.CONTEXT, torch.float64)
        sent = {chunk: counts for rank in ranks for chunk, counts in rank["bytes"].items()}
        for hop in found.hops:
            count = parallel.microbatch_count * STEPS
            assert sent[hop.source].get("forward", 0) == hop.sent_bytes * count, case
            assert sent[hop.target].get("backward", 0) == hop.sent_bytes * count, case
        assert [rank["peak"] for rank in ranks] == [rank.store_tensors for rank in found.ranks], case


# memory


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("residual", ["block_attnres", "full_attnres", "prenorm", "layerscale"])
@pytest.mark.parametrize("split", [{}, {"pp": 3, "microbatches": 3}, {**TWO_ROUNDS, "schedule": "ZBVZeroBubble"}])
def test_parameters_are_those_of_the_chunks(newer_torch, split, residual, tied):
    config, parallel = shape(residual, layers=10, tie_word_embeddings=tied), ParallelConfig(**split)
    found = plan(config, parallel, batch_size=parallel.microbatch_count, context=4)
    layout = Layout(config, parallel, (1, 4, 16), FP32)
    for rank in found.ranks:
        parts = pipeline.chunks(config, layout, rank.rank, 4)
        assert rank.parameters == sum(p.numel() for part in parts for p in part.parameters())
    assert found.model_parameters == config.parameter_counts()["total"]


EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "first_k_dense_replace": 1}


def held(case: dict[str, int], model: dict[str, int]) -> int:
    """Elements of parameters that this process holds."""
    parallel, config, cpu = ParallelConfig(**case), shape(**model), torch.device("cpu")
    mesh = meshes.build(parallel, cpu)
    layout = Layout(config, parallel, (1, 4 // parallel.tp, 16), FP32)
    parts = build_parts(config, layout, mesh, cpu, 4, seed=0, expert_mesh=meshes.of_experts(parallel, mesh))
    local = [p.to_local() if isinstance(p, DTensor) else p for part in parts for p in part.parameters()]
    return sum(p.numel() for p in local)


@pytest.mark.parametrize(
    ("case", "model"),
    [
        ({"tp": 2, "shard": 2}, {}),
        ({"pp": 2, "tp": 2}, {}),
        ({"pp": 2, "shard": 2}, {}),
        ({"dp": 2, "tp": 2}, {}),
        ({"shard": 4}, EXPERTS),
        ({"shard": 4, "ep": 2}, EXPERTS),  # 3 experts of 6, and 2 or 1 of those in a process
        ({"dp": 4, "ep": 2}, EXPERTS),
        ({"pp": 2, "shard": 2, "ep": 2}, EXPERTS),
        ({"tp": 2, "shard": 2, "ep": 2}, EXPERTS),
    ],
)
def test_a_process_holds_its_share(world, case, model):
    parallel = ParallelConfig(**case)
    found = plan(shape(**model), parallel, 4 * parallel.shard * parallel.dp, 4)
    counts = world(4).run(held, case, model)
    size = 4 // parallel.pp
    assert [rank.parameters for rank in found.ranks] == [max(counts[i : i + size]) for i in range(0, 4, size)]


def test_experts_of_one_process_each_are_not_gathered():
    config = shape(**{**EXPERTS, "first_k_dense_replace": 0})
    size = 3 * 6 * 16 * 8  # of the experts of a layer, of which there are six

    def ranks(**sizes: int) -> list[RankPlan]:
        return plan(config, ParallelConfig(**sizes), batch_size=6 * 4, context=4).ranks

    (whole,), (split,), (alone,) = ranks(shard=6), ranks(shard=6, ep=2), ranks(shard=6, ep=6)
    assert whole.gathered_bytes - split.gathered_bytes == 4 * 3 * size // 2
    assert split.gathered_bytes - alone.gathered_bytes == 4 * 3 * size // 2
    assert alone.parameters == whole.parameters == split.parameters
    first, second = ranks(pp=2, shard=2, ep=2, microbatches=2), ranks(pp=2, shard=2, microbatches=2)
    for one, other in zip(first, second, strict=True):
        assert other.gradient_bytes - one.gradient_bytes == 4 * 3 * size // 2
        assert other.gathered_bytes - one.gathered_bytes == 4 * 3 * size


def test_what_is_in_flight_follows_the_schedule(newer_torch):
    config = shape(layers=16)

    def ranks(schedule: str, stages: int, **fields: Any) -> list[RankPlan]:
        split = ParallelConfig(pp=4, virtual_stages=stages, schedule=schedule, microbatches=8)
        return plan(config, split, batch_size=8, context=4, **fields).ranks

    assert [rank.in_flight for rank in ranks("GPipe", 1)] == [[8]] * 4
    assert [rank.in_flight for rank in ranks("1F1B", 1)] == [[4], [3], [2], [1]]
    second, third = (size.kept for size in footprints(config, [0, 4, 8, 12, 16], (1, 4, 16), BF16)[1:3])
    assert [rank.activation_bytes for rank in ranks("1F1B", 1)[1:3]] == [3 * second, 2 * third]
    folded = ranks("ZBVZeroBubble", 2)
    assert all(a.activation_bytes > b.activation_bytes for a, b in zip(ranks("GPipe", 1), folded, strict=True))


def test_the_history_is_held_once_and_its_gradients_wait(newer_torch):
    config, unit = shape(layers=8, residual_options={"block_size": 1}), 4 * 16 * 2
    split = ParallelConfig(pp=2, virtual_stages=2, schedule="LoopedBFS", microbatches=1)
    first, second = plan(config, split, batch_size=1, context=4).ranks
    # rank 0 made b0 b1 b2, received b3 b4, made b5 b6; the gradients of b0 b1 b2 wait for its first chunk
    assert first.history_bytes == (7 + 3) * unit
    # rank 1 received b0 b1 b2, made b3 b4, received b5 b6; the gradients of b0 .. b4 wait
    assert second.history_bytes == (7 + 5) * unit
    folded = ParallelConfig(pp=2, virtual_stages=2, schedule="ZBVZeroBubble", microbatches=1)
    first, second = plan(config, folded, batch_size=1, context=4).ranks
    assert first.history_bytes == (7 + 3) * unit  # made b0 b1 b2, received b3 .. b6
    assert second.history_bytes == 7 * unit  # received b0 b1 b2, made b3 b4, which its next chunk is given, made b5 b6


@pytest.mark.parametrize("split", [{"pp": 2}, {"tp": 2}, {"shard": 2}, {"pp": 2, "shard": 2}, {"dp": 2}])
def test_what_a_parameter_costs(split):
    parallel = ParallelConfig(**split)
    for rank in plan(shape(), parallel, batch_size=8, context=4).ranks:
        whole = rank.parameters * parallel.shard  # every matrix of this shape divides
        assert (rank.parameter_bytes, rank.optimizer_bytes) == (4 * rank.parameters, 8 * rank.parameters)
        if parallel.dp * parallel.shard == 1:
            assert (rank.gathered_bytes, rank.gradient_bytes) == (0, 4 * whole)
        elif parallel.pp > 1:  # gathered from the first micro-batch to the last, and so are the gradients
            assert rank.gathered_bytes == rank.gradient_bytes >= 4 * whole - 4 * 2 * 20
        else:
            assert 0 < rank.gathered_bytes < 4 * whole
            assert rank.gradient_bytes == rank.parameter_bytes


# the rest of a plan


def test_operations_add_up_to_the_models():
    config = shape("full_attnres", layers=10)
    whole = ModelPart(config, 0, 10, 8)
    assert 3 * sum(chunk_flops(config, whole, [0, 3, 4, 10], 8)) == config.flops_per_token(8)


def test_time_is_operations_over_rates():
    config, split = shape("prenorm"), ParallelConfig(pp=2, microbatches=4)
    rates = Cluster(peak_tflops=2e-6, mfu=0.5, link_gbs=1e-3)
    found = plan(config, split, 8, 4, FP32, cluster=rates)
    (hop,) = found.hops
    assert hop.seconds == hop.sent_bytes / 1e6 == 2 * 4 * 16 * 4 / 1e6
    assert hop.compute_seconds == 2 * 4 * chunk_flops(config, ModelPart(config, 0, 12, 4), [0, 6, 12], 4)[1] / 1e6
    busy = found.tokens_per_step * config.flops_per_token(4) / 2 / 1e6
    assert busy < found.step_seconds < 2 * busy
    again = plan(config, split, 8, 4, FP32, checkpointing=True, cluster=rates)
    assert again.step_seconds > 1.2 * found.step_seconds
    halved = plan(config, ParallelConfig(pp=2, tp=2, microbatches=4), 8, 4, FP32, cluster=rates)
    assert halved.hops[0].seconds == hop.seconds / 2
    assert halved.hops[0].compute_seconds == pytest.approx(hop.compute_seconds / 2)


def test_it_fits_or_not():
    def fits(memory: float, reserve: float = 0.0) -> bool:
        cluster = Cluster(memory_gb=memory, reserve_gb=reserve)
        return plan(shape(), ParallelConfig(), 1, 4, cluster=cluster).fits

    need = plan(shape(), ParallelConfig(), 1, 4).ranks[0].total_bytes / 1e9
    assert fits(1.01 * need) and not fits(0.99 * need)
    assert not fits(2 * need, 1.5 * need)


def test_mechanisms_all_have_plans():
    split = ParallelConfig(pp=2, microbatches=2)
    for name in residual.names():
        found = plan(shape(name, layers=8), split, batch_size=2, context=4)
        assert found.hops[0].sent_bytes > 0 and found.ranks[0].activation_bytes > 0, name


@pytest.mark.parametrize("name", ["block_attnres", "full_attnres"])
def test_a_state_that_crosses_hops_is_lean_whatever_the_schedule(name):
    split = ParallelConfig(pp=2, microbatches=2)
    by_layer, two_phase = (
        plan(shape(name, layers=8, residual_options={"schedule": schedule}), split, batch_size=2, context=4)
        for schedule in ("layerwise", "two_phase")
    )
    assert (by_layer.ranks, by_layer.hops) == (two_phase.ranks, two_phase.hops)


# the command

SPLIT = "--parallel.pp 4 --parallel.virtual-stages 2 --parallel.schedule Interleaved1F1B --batch-size 8 --context 64"


def test_the_command_prints_the_plan(server):
    end = server.run("plan", *SPLIT.split(), "--json", "--residual.num-blocks", 8)
    assert end.status == 0, end.err
    found = json.loads(end.out)
    assert sum(hop["sent_bytes"] for hop in found["hops"]) == 21 * 64 * 128 * 2
    assert found["fits"] and len(found["ranks"]) == 4
    end = server.run("plan", *SPLIT.split(), "--residual.num-blocks", 8, "--memory-gb", 0.01, "--reserve-gb", 0)
    assert end.status == 0, end.err
    assert "whole history        2,048     8,960" in end.out
    assert "paper's cache        1,280     6,656" in end.out
    assert "sent        1,024     5,376" in end.out
    assert "too much" in end.out and "does not fit" in end.out and "bubble 15.8%" in end.out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--parallel.pp 4 --batch-size 6", "6 sequences over 8 micro-batches leave 6 over; change batch_size"),
        (
            "--parallel.pp 13 --parallel.virtual-stages 2 --parallel.schedule LoopedBFS --batch-size 26",
            "26 pieces, and",
        ),
        ("--parallel.tp 3", "must be a multiple of parallel.tp: "),
        ("--parallel.shard 4 --parallel.ep 3 --preset kimi-linear-tiny", "4 processes in groups of 3 leave 1 over"),
        ("--parallel.shard 2 --parallel.ep 2", "parallel.ep 2 is for a mixture of experts, and the model has none"),
        ("--mfu 0", "mfu must be positive; it is 0.0"),
        ("--reserve-gb 80", "reserve_gb must be from 0 to below memory_gb, 80.0; it is 80.0"),
    ],
)
def test_the_command_refuses(server, arguments, sentence):
    end = server.run("plan", *arguments.split())
    assert end.status == 2
    assert sentence in end.said
