"""The mesh of a job: its processes as a grid, and the process groups along each of its dimensions."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from math import prod

import torch
from torch import Tensor, distributed
from torch.distributed.device_mesh import DeviceMesh

from ..errors import UsageError
from .config import ParallelConfig
from .rendezvous import fresh_store

DIMENSIONS = ("pp", "dp", "shard", "tp")
"""From the farthest apart to the nearest: tp talks in every layer and so lies on neighbouring devices."""

EXPERT_DIMENSIONS = ("expert_dp", "expert_shard", "ep", "tp")
"""Those of a stage's experts: its dp x shard processes in other groups."""

LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def launched_processes() -> int:
    """Processes of the job that this one belongs to, 1 if torchrun did not start it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def connected(config: ParallelConfig, device: torch.device) -> Iterator[None]:
    """Joins the job that torchrun started; at a good end all leave it together, unless they were in it before.

    After an error this process leaves without the others, which notice and end too: waiting for them could take
    config.timeout. Raises UsageError where torchrun did not start this process.
    """
    before = distributed.is_initialized()
    _connect(config, device)
    yield
    if not before:
        distributed.destroy_process_group()


@contextmanager
def joined(config: ParallelConfig, device: torch.device) -> Iterator[DeviceMesh]:
    """`connected`, with the mesh of the job."""
    with connected(config, device):
        yield build(config, device)


def build(config: ParallelConfig, device: torch.device) -> DeviceMesh:
    """The mesh [pp, dp, shard, tp] of all processes, dimensions of size 1 included.

    Starts the process groups unless they run: gloo for a CPU, NCCL for CUDA, where each process takes the GPU of its
    local rank. Raises UsageError where torchrun did not start this process, or for another number of them.
    """
    _connect(config, device)
    if config.world_size != distributed.get_world_size():
        raise UsageError(
            f"parallel.dp x shard x tp x pp must be the number of processes: {config.world_size}, and there are "
            f"{distributed.get_world_size()}"
        )
    sizes = tuple(getattr(config, name) for name in DIMENSIONS)
    return _mesh(sizes, timedelta(seconds=config.timeout), device.type, distributed.group.WORLD)


def _connect(config: ParallelConfig, device: torch.device) -> None:
    if distributed.is_initialized():
        return
    if missing := [name for name in LAUNCHER if name not in os.environ]:
        raise UsageError(
            f"parallel needs {config.world_size} processes, and torchrun did not start this one ({missing[0]} is "
            f"not set); use: torchrun --nproc-per-node {config.world_size} ..."
        )
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    timeout = timedelta(seconds=config.timeout)
    store, rank, size = fresh_store(timeout)
    backend = "nccl" if device.type == "cuda" else "gloo"
    distributed.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)


def of_experts(config: ParallelConfig, mesh: DeviceMesh) -> DeviceMesh | None:
    """The mesh [expert_dp, expert_shard, ep, tp] that the experts of this process's layers lie on; None if ep is 1.

    mesh: what `build` returned for the same config. The processes of dp x shard, in order, are cut into groups of ep.
    All processes of the job must call it together.
    """
    if config.ep == 1:
        return None
    sizes = (config.pp, *config.expert_replicas, config.ep, config.tp)
    return _expert_mesh(sizes, timedelta(seconds=config.timeout), mesh, distributed.group.WORLD)


@cache
def _mesh(sizes: tuple[int, ...], timeout: timedelta, device_type: str, job: object) -> DeviceMesh:
    """The mesh of a job; made once, since every process group has threads of its own."""
    ranks = torch.arange(prod(sizes)).view(sizes)
    groups = [_group(ranks, dim, name, timeout) for dim, name in enumerate(DIMENSIONS)]
    return DeviceMesh.from_group(groups, device_type, ranks, mesh_dim_names=DIMENSIONS)


@cache
def _expert_mesh(sizes: tuple[int, ...], timeout: timedelta, mesh: DeviceMesh, job: object) -> DeviceMesh:
    ranks = torch.arange(prod(sizes)).view(sizes)
    groups = [_group(ranks, dim, name, timeout) for dim, name in enumerate(EXPERT_DIMENSIONS[:-1], 1)]
    groups.append(mesh.get_group("tp"))
    stage = ranks[mesh.get_local_rank("pp")]
    return DeviceMesh.from_group(groups, mesh.device_type, stage, mesh_dim_names=EXPERT_DIMENSIONS)


def _group(ranks: Tensor, dim: int, name: str, timeout: timedelta) -> distributed.ProcessGroup:
    """This process's group along a dimension of the grid `ranks`."""
    # init_device_mesh would give these groups the backend's own timeout, half an hour for gloo
    lines = ranks.movedim(dim, -1).flatten(0, -2).tolist()
    return distributed.new_subgroups_by_enumeration(lines, timeout=timeout, group_desc=name)[0]
