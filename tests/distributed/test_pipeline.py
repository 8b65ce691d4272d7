"""A pipeline that keeps what it has seen, in real processes, against one process in fp64."""

import inspect

import pytest
import torch
from torch.distributed.pipelining import PipelineStage

from attnres.parallel.stage import CachingStage

from . import pipelines
from .versions import trusted

TOLERANCE = 1e-10


def case(name, schedule="1F1B", stages=1, pp=4, count=8, **rest):
    sizes = {key: rest.pop(key) for key in ("dp", "shard", "ep", "tp", "pipeline_cache") if key in rest}
    model = {"residual": name, **rest.pop("model", {})}
    parallel = {"pp": pp, "virtual_stages": stages, "schedule": schedule, "microbatches": count, **sizes}
    return {"model": model, "parallel": parallel, **rest}


BLOCK, FULL, PLAIN = "block_attnres", "full_attnres", "prenorm"
UNEVEN = [0, 1, 5, 8, 12]  # layers that begin and end a chunk: attentions, MLPs, one layer alone
FOUR = [
    case(PLAIN),
    case(BLOCK),
    case(FULL),
    case(BLOCK, "GPipe", count=5, cuts=UNEVEN, model={"block_size": 3}),
    case(FULL, "1F1B", count=7, cuts=UNEVEN),
    case(BLOCK, "Interleaved1F1B", 2, model={"num_blocks": 4}, evaluate=True),
    case(BLOCK, "Interleaved1F1B", 2, model={"block_size": 5, "tied": True}, checkpointing=True),
    case(FULL, "Interleaved1F1B", 3, model={"tied": True}, steps=3),
    case(BLOCK, "Interleaved1F1B", 2, pipeline_cache="off", model={"num_blocks": 4}),
    case(BLOCK, "LoopedBFS", 2, count=6, evaluate=True),
    case(FULL, "LoopedBFS", 3, count=3, checkpointing=True),
    case(PLAIN, "Interleaved1F1B", 2, model={"tied": True}),
    case(BLOCK, "InterleavedZeroBubble", 2, model={"block_size": 5}),
    case(FULL, "InterleavedZeroBubble", 2, model={"tied": True}),
    case(BLOCK, "ZBVZeroBubble", 2, model={"block_size": 5, "tied": True}),
    case(FULL, "ZBVZeroBubble", 2, evaluate=True),
    case(BLOCK, "DualPipeV", 2, model={"num_blocks": 4}),
    case(FULL, "DualPipeV", 2, model={"tied": True}),
    case(PLAIN, "DualPipeV", 2),
    case("denseformer", "Interleaved1F1B", 2),
    case("hyper_connections", "Interleaved1F1B", 2),
    case("siamesenorm"),
    case(BLOCK, "Interleaved1F1B", 2, model={"block_size": 4, "reads": "transformer_block"}, evaluate=True),
    case(BLOCK, count=5, cuts=UNEVEN, model={"num_blocks": 3, "reads": "block"}),
    case(BLOCK, "ZBVZeroBubble", 2, model={"num_blocks": 3, "reads": "mlp", "tied": True}, checkpointing=True),
    # with other dimensions of the mesh
    case(BLOCK, pp=2, dp=2, count=4),
    case(BLOCK, "Interleaved1F1B", 3, pp=2, tp=2, count=4, model={"tied": True, "block_size": 5}),
    case(FULL, "Interleaved1F1B", 2, pp=2, shard=2, count=4, model={"tied": True}),
    case(BLOCK, "Interleaved1F1B", 2, pp=2, shard=2, count=4, checkpointing=True),
    case(BLOCK, "ZBVZeroBubble", 2, pp=2, shard=2, count=4, model={"tied": True}),
    case(PLAIN, pp=2, tp=2, count=4),
    case(BLOCK, "Interleaved1F1B", 2, pp=2, tp=2, count=4, model={"hybrid": True}),
    case(BLOCK, pp=2, shard=2, count=4, checkpointing=True, model={"hybrid": True}),
    case(BLOCK, pp=2, shard=2, ep=2, count=2, checkpointing=True, evaluate=True, model={"hybrid": True}),
    case(BLOCK, "ZBVZeroBubble", 2, pp=2, dp=2, ep=2, count=4, model={"hybrid": True}),
]
TWO = [case(BLOCK, "Interleaved1F1B", 4, pp=2, count=2 + 2 * i, model={"block_size": 1 + 2 * i}) for i in range(2)]
TWO += [case(name, "Interleaved1F1B", 2, pp=2, count=2, model={"schedule": "two_phase"}) for name in (BLOCK, FULL)]
EIGHT = [
    case(BLOCK, "Interleaved1F1B", 2, pp=2, shard=2, tp=2, count=2, model={"tied": True}),
    case(FULL, pp=2, dp=2, shard=2, count=2),
    case(BLOCK, pp=2, shard=4, ep=2, count=2, model={"hybrid": True}),
]


def name_of(case):
    parts = [case["model"]["residual"], *map(str, case["parallel"].values())]
    return "-".join([*parts, *(key for key in case if key not in ("model", "parallel"))])


@pytest.mark.parametrize(("size", "cases"), [(4, FOUR[:10]), (4, FOUR[10:19]), (4, FOUR[19:]), (2, TWO), (8, EIGHT)])
def test_loss_gradients_and_bytes_are_those_of_one_process(world, size, cases):
    cases = [case for case in cases if trusted(case["parallel"]["schedule"])]
    ranks = world(size).run(pipelines.compare_all, cases, seconds=240)
    for one, results in zip(cases, zip(*ranks, strict=True), strict=True):
        label = name_of(one)
        assert max(result["loss"] for result in results) < TOLERANCE, label
        assert max(result["gradient"] for result in results) < TOLERANCE, label
        assert not any(result["lost"] for result in results), label
        assert not any(result["store"] for result in results), label
        assert not any(result["buffers"] for result in results), label
        if one["parallel"].get("pipeline_cache") != "off":
            assert all(result["places"] == 1 for result in results), label
        check_bytes(one, results, label)


def check_bytes(one, results, label):
    """What every chunk sent is what the routing table says, for every micro-batch and both ways."""
    expected = results[0]["hops"]
    evaluated = 2 if one.get("evaluate") else 1
    for result in results:
        for chunk, sent in result["bytes"].items():
            forward = expected[chunk] if chunk < len(expected) else 0
            backward = expected[chunk - 1] if chunk else 0
            assert sent.get("forward", 0) == forward * result["runs"] * evaluated, (label, chunk)
            assert sent.get("backward", 0) == backward * result["runs"], (label, chunk)


def test_a_cache_sends_less_and_stores_more(world):
    on, off = (case(BLOCK, "Interleaved1F1B", 2, pipeline_cache=way, model={"num_blocks": 12}) for way in ("on", "off"))
    (cached, *_), (naive, *_) = (world(4).run(pipelines.compare, one) for one in (on, off))
    assert sum(cached["hops"]) < 0.6 * sum(naive["hops"])
    assert cached["peak"] > 0 == naive["peak"]


@pytest.mark.parametrize(
    "mutation", ["deposits are dropped", "deposits are counted twice", "the last deposit replaces the others"]
)
def test_mutations_are_noticed(world, mutation):
    results = world(2).run(pipelines.mutated, mutation, case(BLOCK, "Interleaved1F1B", 4, pp=2, count=2))
    assert max(result["gradient"] for result in results) > 1e-4


def test_what_is_overridden_is_still_there():
    """A torch release that renames one of these would silently run without a cache."""
    expected = {
        "forward_one_chunk": ["fwd_chunk_id", "args", "kwargs", "save_forward_output"],
        "forward_maybe_with_nosync": ["args", "kwargs"],
        "backward_one_chunk": ["bwd_chunk_id", "loss", "full_backward", "last_backward"],
        "backward_weight_one_chunk": ["bwd_chunk_id", "last_backward"],
        "backward_maybe_with_nosync": ["backward_type", "bwd_kwargs", "last_backward"],
        "get_local_bwd_output": ["mb_index"],
        "set_local_bwd_input": ["next_stage_bwd_outputs", "mb_index"],
        "get_fwd_recv_ops": ["fwd_chunk_id"],
        "get_bwd_recv_ops": ["bwd_chunk_id"],
        "get_fwd_send_ops": ["fwd_chunk_id"],
        "get_bwd_send_ops": ["bwd_chunk_id"],
        "clear_runtime_states": [],
        "_prepare_forward_infra": None,
        "_prepare_backward_infra": None,
    }
    own = {"__init__", "finish_sends"}
    assert expected.keys() | own >= {
        n for n, f in vars(CachingStage).items() if inspect.isfunction(f) and hasattr(PipelineStage, n)
    }
    for name, parameters in expected.items():
        found = list(inspect.signature(getattr(PipelineStage, name)).parameters)[1:]
        assert parameters is None or found == parameters, name
        assert name in vars(CachingStage), name


def test_a_stage_outlives_torch_detaching_its_outputs():
    from attnres.parallel.stage import _alias

    given = torch.ones(3, requires_grad=True)
    alias = _alias(given)
    assert alias.data_ptr() == given.data_ptr()
    alias.detach_()
    assert given.requires_grad
