"""What a split is made of, and that every one that cannot work is refused with its sums."""

from dataclasses import replace

import pytest
import torch

from attnres.errors import UsageError
from attnres.model import DecoderConfig
from attnres.parallel.config import ParallelConfig

MODEL = DecoderConfig(
    hidden_size=48, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2, intermediate_size=64
)
EXPERTS = replace(MODEL, num_experts=8, num_experts_per_tok=2)
SPLIT = {"pp": 2, "virtual_stages": 2, "microbatches": 4}


def check(world_size=None, model=MODEL, batch_size=16, context=32, checkpointing=False, **sizes):
    config = ParallelConfig(**sizes)
    config.check(world_size or config.world_size, model, batch_size, context, checkpointing)
    return config


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"dp": 2, "shard": 2, "tp": 2, "pp": 2},
        {"dp": 2, "shard": 2, "ep": 4, "tp": 2, "pp": 2, "model": EXPERTS},
        {"pp": 3, "microbatches": 4},
        {"pp": 3, "virtual_stages": 2, "schedule": "LoopedBFS", "microbatches": 1},
        {"pp": 2, "virtual_stages": 3, "schedule": "Interleaved1F1B"},
        {"pp": 2, "virtual_stages": 1, "schedule": "InterleavedZeroBubble"},
        {**SPLIT, "schedule": "ZBVZeroBubble", "microbatches": 1},
        {**SPLIT, "schedule": "DualPipeV"},
        {"pp": 4, "schedule": "GPipe", "microbatches": 1},
    ],
)
def test_splits_that_work_are_let_through(newer_torch, sizes):
    check(**sizes)


@pytest.mark.parametrize(
    ("sizes", "left"),
    [((2, 4, 1), (2, 4)), ((2, 4, 2), (2, 2)), ((2, 4, 4), (2, 1)), ((2, 4, 8), (1, 1)), ((3, 4, 6), (2, 1))],
)
def test_experts_take_processes_of_shard_first_and_leave_the_rest_to_copies(sizes, left):
    config = ParallelConfig(**dict(zip(("dp", "shard", "ep"), sizes, strict=True)))
    assert config.expert_replicas == left and config.world_size == sizes[0] * sizes[1]


def test_sizes_that_follow_from_others():
    assert ParallelConfig().microbatch_count == 1
    config = ParallelConfig(dp=2, shard=3, tp=5, pp=4, virtual_stages=2)
    assert (config.microbatch_count, config.world_size, config.chunks) == (8, 120, 8)


REFUSALS = [
    ({"dp": 0}, r"parallel\.dp must be a positive whole number; it is 0"),
    ({"tp": 1.5}, r"parallel\.tp must be a positive whole number; it is 1\.5"),
    ({"microbatches": 0}, r"parallel\.microbatches must be a positive whole number; it is 0"),
    ({"timeout": -1}, r"parallel\.timeout must be a positive whole number; it is -1"),
    ({"schedule": "2F2B"}, r"parallel\.schedule must be one of GPipe, 1F1B, .*DualPipeV; it is '2F2B'"),
    ({"dp": 2, "tp": 2, "world_size": 6}, r"2 x 1 x 2 x 1 = 4, and there are 6.*start 4 processes"),
    ({"dp": 2, "shard": 3}, r"batch_size .*16 sequences over 2 x 3 = 6 leave 4 over"),
    ({"dp": 2, "pp": 3, "microbatches": 3}, r"16 / \(2 x 1\) = 8 sequences over 3 micro-batches leave 2 over"),
    ({"ep": 0}, r"parallel\.ep must be a positive whole number; it is 0"),
    (
        {"dp": 2, "shard": 2, "ep": 3, "model": EXPERTS},
        r"parallel\.ep must divide parallel\.dp x shard: 2 x 2 = 4 processes in groups of 3 leave 1 over",
    ),
    ({"tp": 2, "ep": 2}, r"parallel\.ep must divide parallel\.dp x shard: 1 x 1 = 1 processes in groups of 2 leave 1"),
    (
        {"shard": 2, "ep": 2},
        r"parallel\.ep 2 is for a mixture of experts, and the model has none; leave it out, or set",
    ),
    (
        {"shard": 2, "ep": 2, "model": replace(EXPERTS, first_k_dense_replace=3)},
        r"parallel\.ep 2 is for a mixture of experts, and the model has none",
    ),
    (
        {"shard": 16, "ep": 16, "model": EXPERTS},
        r"num_experts must be a multiple of parallel\.ep: 8 over 16 leaves 8 over",
    ),
    ({"tp": 2, "context": 33}, r"context must be a multiple of parallel\.tp: 33 over 2 leaves 1 over"),
    ({"tp": 4}, r"num_attention_heads must be a multiple of parallel\.tp: 6 over 4 leaves 2 over"),
    ({"tp": 3, "context": 33}, r"num_key_value_heads must be a multiple of parallel\.tp: 2 over 3 leaves 2 over"),
    (
        {"tp": 3, "context": 33, "model": DecoderConfig(hidden_size=48, num_attention_heads=6, intermediate_size=64)},
        r"intermediate_size must be a multiple of parallel\.tp: 64 over 3 leaves 1 over",
    ),
    ({"virtual_stages": 2}, r"parallel\.virtual_stages is for a pipeline, and parallel\.pp is 1"),
    ({"microbatches": 4}, r"parallel\.microbatches is for a pipeline, and parallel\.pp is 1"),
    (
        {"pp": 4, "virtual_stages": 2, "schedule": "LoopedBFS"},
        r"4 x 2 = 8 pieces, and 3 x 2 = 6 layers",
    ),
    ({"pp": 2, "virtual_stages": 2}, r"1F1B has one stage in a process, and virtual_stages is 2; use Interleaved1F1B"),
    ({"pp": 2, "schedule": "ZBVZeroBubble"}, r"ZBVZeroBubble has two stages in every process; .* to 2, not 1"),
    (
        {"pp": 2, "virtual_stages": 3, "schedule": "DualPipeV"},
        r"DualPipeV has two stages in every process; .* to 2, not 3",
    ),
    (
        {**SPLIT, "schedule": "InterleavedZeroBubble", "checkpointing": True},
        r"InterleavedZeroBubble splits the backward pass, so that checkpointing .* leave out checkpointing",
    ),
    ({"pp": 4, "microbatches": 2}, r"1F1B needs as many .*microbatches is 2, and there are 4 stages"),
    ({**SPLIT, "schedule": "DualPipeV", "microbatches": 2}, r"microbatches is 2, and there are 4 stages"),
    (
        {"pp": 3, "schedule": "Interleaved1F1B", "microbatches": 7, "batch_size": 7, "virtual_stages": 2},
        r"7 micro-batches in 7 // 3 = 2 rounds leave 1 over; make microbatches a multiple of pp",
    ),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSALS)
def test_what_cannot_work_is_refused_with_its_sums(newer_torch, arguments, message):
    with pytest.raises(UsageError, match=message):
        check(**arguments)


@pytest.mark.parametrize("schedule", ["InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV"])
def test_split_backward_passes_are_refused_on_an_older_torch(monkeypatch, schedule):
    monkeypatch.setattr(torch, "__version__", "2.12.1+cpu")
    with pytest.raises(UsageError, match=rf"{schedule} splits the backward pass.*2\.13.*this is 2\.12\.1"):
        check(**SPLIT, schedule=schedule)
    check(**SPLIT, schedule="Interleaved1F1B")
