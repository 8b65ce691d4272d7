"""What every residual connection costs: parameters, operations, traffic, step time, memory, time to compile.

    PYTHONPATH=src python benchmarks/mechanisms.py [--only NAME ...] [--limit 600] [--seconds 3600]

The network is L = 24 layers of one matrix, D = 512, behind the norms that the mechanism asks for: layers so cheap that
what is measured is the residual connection (a layer of a decoder of that width has six times the arithmetic). A step is
forward and backward over 512 tokens in float32 on one thread of the CPU. Each mechanism has a process of its own, one
eager and one under torch.compile, in which its steps and prenorm's take turns; the ratio is that of processor time,
round by round, which other programs on the machine disturb least. Under torch.compile it is the six layers in the
middle, which have the mean number of sources, as one graph: all 24 would compile for many minutes each. Compiling is
timed as processor time, with that of the C++ compiler; kernels that a mechanism shares with prenorm, or with one that
was measured before in the same run, are compiled already.

Results are saved after every process, and a run goes on where the last one stopped: it measures what the results file
lacks, or anew what --only names. A process over its time is listed as such.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import mechanism_traffic
import timing
import torch
from memory import allocated
from torch import nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from attnres import residual as residuals

LAYERS, WIDTH, TOKENS = 24, 512, 512
MIDDLE = range(9, 15)
"""The layers that are compiled: of the mean depth, and whole periods of blocks of two and of three layers."""
EPS = 1e-6
MODES = ("eager", "compiled")
NAME = "mechanisms_cpu"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=timing.RESULTS, help="folder of the results")
    parser.add_argument("--only", nargs="+", choices=residuals.names(), metavar="NAME", help="measure these anew")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), help="eager, compiled")
    parser.add_argument("--repeats", type=int, default=9, help="timed rounds")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--limit", type=float, default=600, help="seconds that one process may take")
    parser.add_argument("--seconds", type=float, default=3600, help="seconds that all of it may take")
    parser.add_argument("--worker", nargs=2, metavar=("NAME", "MODE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.worker:
        print(json.dumps(measure(*arguments.worker, arguments.repeats)))
        return
    shape = {"layers": LAYERS, "width": WIDTH, "tokens": TOKENS, "repeats": arguments.repeats}
    document = load(arguments.out, timing.facts(torch.device("cpu"), dtype="torch.float32", **shape))
    end = time.monotonic() + arguments.seconds
    lock = threading.Lock()
    with tempfile.TemporaryDirectory() as cache, ThreadPoolExecutor(arguments.jobs) as pool:

        def one(task: tuple[str, str]) -> None:
            mode, name = task
            allowed = min(arguments.limit, end - time.monotonic())
            part = {"failed": "not reached"}
            if allowed > 0:
                part = in_process(name, mode, arguments.repeats, allowed, cache)
                print(f"{name}, {mode}: {json.dumps(part)}", file=sys.stderr, flush=True)
            with lock:
                document["rows"].setdefault(name, {}).update({**counts(name), mode: part})
                timing.save(arguments.out, NAME, document, page(document))

        every = [(mode, name) for mode in arguments.modes for name in arguments.only or residuals.names()]
        done = [] if arguments.only else [(mode, name) for mode, name in every if found(document, name, mode)]
        list(pool.map(one, [task for task in every if task not in done]))
    print("\n".join(page(document)))


def load(folder: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """The results so far, or none where the file is of another shape, version or machine."""
    path = folder / f"{NAME}.json"
    document = json.loads(path.read_text()) if path.exists() else {}
    changing = ("commit", "date", "repeats")
    if any(document.get(key) != value for key, value in facts.items() if key not in changing):
        document = {**facts, "rows": {}}
    return document


def found(document: dict[str, Any], name: str, mode: str) -> bool:
    return "ratio" in document["rows"].get(name, {}).get(mode, {})


def build(name: str) -> residuals.Residual:
    return residuals.build(name, WIDTH, LAYERS, **residuals.get(name).decoder_options)


def counts(name: str) -> dict[str, Any]:
    """What need not be measured."""
    residual = build(name)
    traffic = mechanism_traffic.traffic(name, residual)
    return {
        "parameters": sum(p.numel() for p in residual.parameters()),
        "flops": sum(residual.read_flops(layer) for layer in range(LAYERS + 1)) / LAYERS,
        "traffic": traffic.per_width(WIDTH),
    }


def in_process(name: str, mode: str, repeats: int, seconds: float, cache: str) -> dict[str, Any]:
    """`measure` in a process of its own: its result, or {"failed": why there is none}."""
    command = [sys.executable, __file__, "--worker", name, mode, "--repeats", str(repeats)]
    own = {"TORCHINDUCTOR_COMPILE_THREADS": "1", "TORCHINDUCTOR_CACHE_DIR": cache, "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, env={**os.environ, **own}, stdout=pipe, stderr=pipe, text=True, start_new_session=True
    ) as worker:
        try:
            out, errors = worker.communicate(timeout=seconds)
        except BaseException as error:
            os.killpg(worker.pid, signal.SIGKILL)  # compilers that it started too
            if isinstance(error, subprocess.TimeoutExpired):
                return {"failed": f"not ready within {seconds:.0f} s"}
            raise
    if worker.returncode:
        return {"failed": (errors.strip().splitlines() or [f"ended with {worker.returncode}"])[-1][:200]}
    return json.loads(out.splitlines()[-1])


def measure(name: str, mode: str, repeats: int) -> dict[str, Any]:
    """Ratio of a step's processor time to prenorm's and its peak memory; seconds that compiling took."""
    steps, first = {}, {}
    for which in dict.fromkeys(("prenorm", name)):
        steps[which] = step(which, mode)
        first.setdefault(which, processor_seconds(steps[which]))
    rounds = [{which: processor_seconds(call) for which, call in steps.items()} for _ in range(repeats + 1)][1:]
    seconds = {which: [one[which] for one in rounds] for which in steps}
    result = {
        "ratio": timing.spread([one[name] / one["prenorm"] for one in rounds]),
        "milliseconds": 1e3 * median(seconds[name]),
        "prenorm milliseconds": 1e3 * median(seconds["prenorm"]),
        "peak": allocated(steps[name], torch.device("cpu"))[0] / (4 * TOKENS * WIDTH),
    }
    if mode == "compiled":
        result["compile seconds"] = first[name] - median(seconds[name])
    return result


def processor_seconds(call: Callable[[], Any]) -> float:
    """Of this process and of compilers that it waited for."""
    children = sum(os.times()[2:4])
    own = time.process_time()
    call()
    return time.process_time() - own + sum(os.times()[2:4]) - children


class Network(nn.Module):
    """Layers of one matrix around a residual connection, with norms as in a decoder."""

    def __init__(self, residual: residuals.Residual) -> None:
        super().__init__()
        self.residual = residual
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS))
        norm = (lambda: nn.RMSNorm(WIDTH, EPS)) if residual.pre_norm else nn.Identity
        self.norms = nn.ModuleList(norm() for _ in range(LAYERS + 1))

    def forward(self, state: Any, layers: range) -> Any:
        for i in layers:
            x, state = self.residual.read(state, i, self.norms[i])
            state = self.residual.write(state, i, self.layers[i](x))
        return self.residual.finish(state, self.norms[-1]) if layers.stop == LAYERS else state


def step(name: str, mode: str) -> Callable[[], None]:
    """Forward and backward; gradients are added to those of the step before, as with several micro-batches."""
    torch.manual_seed(0)
    net = Network(build(name))
    state = net.residual.start(torch.randn(TOKENS, WIDTH))
    if mode == "eager":
        forward, layers = net, range(LAYERS)
    else:
        forward, layers = timing.compiled(net), MIDDLE
        with torch.no_grad():
            state = net(state, range(layers.start))
    leaves, form = tree_flatten(state)
    given = [leaf if leaf is None else leaf.detach().requires_grad_() for leaf in leaves]
    handed = {id(leaf) for leaf in given}

    def call() -> None:
        made = tree_leaves(forward(tree_unflatten(given, form), layers))
        made = [leaf for leaf in made if leaf is not None and id(leaf) not in handed]
        torch.autograd.backward(made, [torch.ones_like(leaf) for leaf in made])

    return call


def page(document: dict[str, Any]) -> list[str]:
    facts = ", ".join(f"{k} {v}" for k, v in document.items() if k != "rows")
    header = ["", "parameters", "operations, D", "traffic, D"]
    for mode in MODES:
        header += [f"step, {mode}", f"peak, {mode}"]
    cells = [
        [name, f"{row['parameters']:,}", f"{row['flops'] / WIDTH:.1f}", f"{row['traffic']:.1f}"]
        + [cell for mode in MODES for cell in measured(row.get(mode, {"failed": "not reached"}))]
        + [f"{row['compiled']['compile seconds']:.0f}" if "compile seconds" in row.get("compiled", {}) else ""]
        for name, row in document["rows"].items()
    ]
    return [
        "# What every residual connection costs",
        "",
        facts,
        "",
        "Parameters are what the mechanism adds. Operations (forward) and traffic (reads and writes, by formula) are",
        "per token and layer, in units of the width D. Step: processor time, forward and backward, to prenorm's in",
        f"the same process, median (range); compiled, of the layers {MIDDLE.start} to {MIDDLE.stop - 1} alone.",
        "Peak: the most memory of a step, in [T, D] tensors. Compiling: processor seconds for those layers.",
        "",
        *timing.markdown_table([*header, "compiling, s"], cells),
    ]


def measured(part: dict[str, Any]) -> list[str]:
    if "failed" in part:
        return [part["failed"], ""]
    ratio = part["ratio"]
    return [f"{ratio['median']:.2f} ({ratio['min']:.2f}..{ratio['max']:.2f})", f"{part['peak']:.0f}"]


if __name__ == "__main__":
    main()
