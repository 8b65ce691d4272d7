"""Real processes that talk over gloo. They are started once and then run many functions, for starting takes seconds."""

import multiprocessing
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import closing, suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import distributed

ROOT = str(Path(__file__).parents[2])
if ROOT not in sys.path:  # the processes import the functions that they run by the names that pytest gave these modules
    sys.path.insert(0, ROOT)

NO_GPUS = {"CUDA_VISIBLE_DEVICES": ""}

# forked from one process that has imported all of it, they start in a fraction of the time
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "pytest",
        "torch",
        "torch.distributed.fsdp",
        "attnres.train.trainer",
        "attnres.commands.train",
        "attnres.hf",
    ]
)


class World:
    """`size` processes with the environment that torchrun gives."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.connections: list[Connection] = []
        self.processes: list[Any] = []

    def run(self, function: Callable[..., Any], *args: Any, seconds: float = 120) -> list[Any]:
        """What function(*args) returns in each process, by rank. The function must be importable.

        If it raises in one of them, or takes longer than `seconds`, all are killed and the test fails with what was
        raised; the next call starts new ones. Results are pickled: numbers and names rather than tensors.
        """
        if not self.processes:
            self._start()
        for connection in self.connections:
            connection.send((function, args))
        results: dict[int, Any] = {}
        deadline = time.monotonic() + seconds
        while len(results) < self.size:
            waiting = {self.connections[rank]: rank for rank in range(self.size) if rank not in results}
            ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                self.kill()
                raise AssertionError(f"ranks {sorted(waiting.values())} had nothing to say for {seconds} s")
            for connection in ready:
                try:
                    good, result = connection.recv()
                except EOFError:
                    good, result = False, "the process died"
                if not good:
                    self.kill()
                    raise AssertionError(f"rank {waiting[connection]} of {self.size}: {result}")
                results[waiting[connection]] = result
        return [results[rank] for rank in range(self.size)]

    def close(self) -> None:
        """Ends the processes in good order."""
        for connection in self.connections:
            with suppress(OSError):
                connection.send(None)
        for process in self.processes:
            process.join(10)
        self.kill()

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self.processes, self.connections = [], []

    def _start(self) -> None:
        with closing(socket.socket()) as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        with mock.patch.dict(os.environ, NO_GPUS):  # for the process that they are forked from
            for rank in range(self.size):
                ours, theirs = CONTEXT.Pipe()
                process = CONTEXT.Process(target=_serve, args=(theirs, rank, self.size, port), daemon=True)
                process.start()
                theirs.close()
                self.connections.append(ours)
                self.processes.append(process)


def leave_gpus_alone() -> None:
    """Has this process compute on the CPU, on a machine with fewer GPUs than processes too. To be called first.

    transformers gives each process of a split model the accelerator that torch was built for, there or not.
    """
    os.environ |= NO_GPUS
    torch._C._get_accelerator = lambda check=None: torch.device("cpu")


def _serve(connection: Connection, rank: int, size: int, port: int) -> None:
    leave_gpus_alone()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    with suppress(EOFError):  # whoever started this process is gone
        while (call := connection.recv()) is not None:
            function, args = call
            try:
                connection.send((True, function(*args)))
            except BaseException:
                connection.send((False, traceback.format_exc()))
    if distributed.is_initialized():
        distributed.destroy_process_group()
