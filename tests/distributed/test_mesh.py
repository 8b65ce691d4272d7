"""The processes as a grid, and what happens when one of them fails."""

import os
import time

import pytest
import torch
from torch import distributed

from attnres.errors import UsageError
from attnres.parallel import mesh
from attnres.parallel.config import ParallelConfig

CPU = torch.device("cpu")


def grid(timeout: int) -> tuple[dict[str, list[int]], dict[str, int], float]:
    """Ranks that share a group, by dimension; this process's coordinates; the sum of all ranks along shard and tp."""
    built = mesh.build(ParallelConfig(dp=1, shard=2, tp=2, timeout=timeout), CPU)
    groups = {name: distributed.get_process_group_ranks(built.get_group(name)) for name in mesh.DIMENSIONS}
    value = torch.tensor(float(distributed.get_rank()))
    for name in ("shard", "tp"):
        distributed.all_reduce(value, group=built.get_group(name))
    return groups, {name: built.get_local_rank(name) for name in mesh.DIMENSIONS}, value.item()


def test_every_dimension_has_its_groups_and_tp_lies_on_neighbours(world):
    results = world(4).run(grid, 60)
    for rank, (groups, place, total) in enumerate(results):
        shard, tp = divmod(rank, 2)
        assert place == {"pp": 0, "dp": 0, "shard": shard, "tp": tp}
        assert groups == {"pp": [rank], "dp": [rank], "shard": [tp, 2 + tp], "tp": [2 * shard, 2 * shard + 1]}
        assert total == 6


def grid_of_experts(sizes: dict[str, int]) -> tuple[dict[str, list[int]], bool]:
    """Ranks that share a group of the experts' mesh, by dimension; whether asking again makes no other mesh."""
    config = ParallelConfig(**sizes)
    built = mesh.build(config, CPU)
    found = mesh.of_experts(config, built)
    groups = {name: distributed.get_process_group_ranks(found.get_group(name)) for name in mesh.EXPERT_DIMENSIONS}
    return groups, mesh.of_experts(config, built) is found


def test_experts_are_shared_by_neighbours_among_those_that_train_on_other_rows(world):
    assert world(4).run(grid_of_experts, {"shard": 4, "ep": 2}) == [
        ({"expert_dp": [rank], "expert_shard": [rank % 2, rank % 2 + 2], "ep": pair, "tp": [rank]}, True)
        for rank, pair in enumerate([[0, 1], [0, 1], [2, 3], [2, 3]])
    ]
    assert world(4).run(grid_of_experts, {"dp": 2, "pp": 2, "ep": 2}) == [
        ({"expert_dp": [rank], "expert_shard": [rank], "ep": pair, "tp": [rank]}, True)
        for rank, pair in enumerate([[0, 1], [0, 1], [2, 3], [2, 3]])
    ]
    assert world(4).run(grid_of_experts, {"shard": 2, "tp": 2, "ep": 2}) == [
        ({"expert_dp": [rank], "expert_shard": [rank], "ep": [rank % 2, rank % 2 + 2], "tp": pair}, True)
        for rank, pair in enumerate([[0, 1], [0, 1], [2, 3], [2, 3]])
    ]


def wait_for_nobody() -> tuple[str, float]:
    """What a process is told whose neighbour does not come, and after how many seconds."""
    built = mesh.build(ParallelConfig(tp=2, timeout=2), CPU)
    began = time.monotonic()
    if distributed.get_rank() == 0:
        with pytest.raises(RuntimeError) as caught:
            distributed.all_reduce(torch.ones(1), group=built.get_group("tp"))
        return str(caught.value), time.monotonic() - began
    return "", 0.0  # this process lives on, and does not take part


def test_a_process_waits_no_longer_than_the_timeout_for_another(world):
    (message, seconds), _ = world(2).run(wait_for_nobody)
    world(2).kill()  # its groups are broken
    assert "imed out" in message and 1 < seconds < 60


def come_and_go() -> list[bool]:
    """Whether this process is in a job: before, inside, after."""
    seen = [distributed.is_initialized()]
    with mesh.joined(ParallelConfig(dp=2), CPU):
        seen.append(distributed.is_initialized())
    return [*seen, distributed.is_initialized()]


def test_a_job_is_joined_and_left(world):
    world(2).kill()  # those that run have joined one already
    assert world(2).run(come_and_go) == [[False, True, False]] * 2


def fail_on(rank: int) -> int:
    if int(os.environ["RANK"]) == rank:
        raise ArithmeticError(f"rank {rank} cannot")
    return int(os.environ["RANK"])


def test_errors_of_a_rank_are_shown_and_new_processes_started(world):
    assert world(2).run(fail_on, 7) == [0, 1]
    with pytest.raises(AssertionError, match=r"rank 1 of 2: (.|\n)*ArithmeticError: rank 1 cannot"):
        world(2).run(fail_on, 1)
    with pytest.raises(AssertionError, match=r"ranks \[0, 1\] had nothing to say for 0\.5 s"):
        world(2).run(time.sleep, 60, seconds=0.5)
    assert world(2).run(fail_on, 7) == [0, 1]


def test_without_torchrun_it_says_how_to_start(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(UsageError, match=r"needs 8 processes.*RANK is not set.*torchrun --nproc-per-node 8"):
        mesh.build(ParallelConfig(dp=2, tp=4), CPU)
    monkeypatch.setenv("WORLD_SIZE", "16")
    assert mesh.launched_processes() == 16
    monkeypatch.delenv("WORLD_SIZE")
    assert mesh.launched_processes() == 1
