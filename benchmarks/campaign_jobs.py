"""What benchmarks/campaign.py asks of a process with the device: is a kernel right, how long does it take.

Every function here takes a `Spec`, runs in a child process and returns what JSON can hold. All of them go through the
public functions of `attnres.ops` and the classes of `attnres.residual`, so that kernels can be rewritten beneath them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import byte_model
import cases
import inference
import timing
import torch
from cases import EPS, Bench, Variant, truth
from paths import Path, residual_path
from torch import Tensor

import ops as ops_script
from attnres import ops
from attnres.bench import rivals
from attnres.residual import BlockAttnRes, FullAttnRes, PreNorm
from attnres.run import hardware

TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-4}  # relative, of any output or gradient
L2_BYTES = 120e6  # more than any L2 cache holds: inputs of this size come from memory each time


@dataclass(frozen=True)
class Spec:
    """One question. n: sources; S: queries of phase 1, layers in a block of a path; L: layers of a path."""

    op: str
    width: int
    tokens: int
    n: int = 0
    S: int = 0
    L: int = 0
    dtype: str = "bfloat16"
    repeats: int = 15

    @property
    def name(self) -> str:
        sizes = [f"{k}={getattr(self, k)}" for k in ("n", "L", "S") if getattr(self, k)]
        return " ".join([f"{self.op},", *sizes, f"D={self.width} T={self.tokens}"])

    def warm(self) -> Spec:
        """The same kernels on few tokens, timed by nobody."""
        return replace(self, tokens=min(self.tokens, 512), repeats=1)


def open_bench(dtype: str = "bfloat16", only: Sequence[str] = ()) -> Bench:
    """With the rivals named in `only`. On a CPU, TRITON_INTERPRET=1 makes Triton's interpreter the backend."""
    device = hardware.find_device("auto")
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        ops.set_backend("triton")
    torch.manual_seed(0)
    found = {}
    if only:
        found, missing = rivals.load(device)
        for name in only:
            if name not in found:
                raise RuntimeError(missing[name])
    return Bench(device, getattr(torch, dtype), {name: found[name] for name in only}, compiled=False)


def describe(quick: bool) -> dict[str, Any]:
    """The facts of a call of the campaign, the measured copy rate in bytes per second among them."""
    device = open_bench().device
    rate = ops_script.copy_rate(device, 2**20 if quick else 2**30)
    return timing.facts(device, **{"copy rate": rate, "rivals": {p: timing.version(p) for p in _packages()}})


def _packages() -> list[str]:
    return sorted(set(rivals.PACKAGES.values()))


# Single ops


def inputs(bench: Bench, spec: Spec) -> tuple[list[Tensor], list[Tensor], Callable[..., list[Tensor]]]:
    """(what all tokens share, rows of tokens, the op as a function of both lists): leaves that want gradients."""
    (weight,) = (1 + 0.1 * torch.randn(1, spec.width, device=bench.device)).to(bench.dtype)
    vectors = bench.vectors(spec.S, spec.width) if spec.op.startswith("phase 1") else bench.vectors(spec.width)
    counts = {"phase 2": 3, "phase 2, first": 2, "add + norm": 2, "norm": 1, "read, prior": spec.n + 1}
    rows = bench.rows(spec.tokens, spec.width, counts.get(spec.op, spec.n))
    shared = [] if spec.op in ("add + norm", "norm") else [*vectors]
    if spec.op not in ("read, no norm", "phase 1"):
        shared.append(weight)
    if spec.op.startswith("phase 2") or spec.op == "read, prior":
        rows.append(torch.randn(spec.tokens, device=bench.device))
    scale = float(spec.n + 1)

    def call(shared: list[Tensor], rows: list[Tensor]) -> list[Tensor]:
        norm = (shared[-1], EPS)
        if spec.op == "read":
            x, handed = ops.read_norm_chained(shared[0], rows, shared[1], EPS, scale=scale, norm=norm)
            return [x, *handed]
        if spec.op == "read, no norm":
            h = ops.depth_attention(shared[0], rows, shared[1], EPS)
            assert isinstance(h, Tensor)
            return [h]
        if spec.op == "read, prior":
            *sources, out, lse = rows
            x, handed = ops.read_norm_chained(
                shared[0], sources, shared[1], EPS, scale=scale, norm=norm, prior=(out, lse)
            )
            return [x, *handed]
        if spec.op.startswith("phase 1"):
            of_first = {"scale": scale, "norm": norm} if spec.op == "phase 1, norm" else {}
            outs, lses, handed = ops.inter_block_chained(shared[0], rows, shared[1], EPS, **of_first)
            return [*outs, *lses, *handed]
        if spec.op.startswith("phase 2"):
            *partial, update, out, lse = rows
            first = partial[0] if partial else None
            return [*ops.merge_norm(shared[0], first, update, shared[1], out, lse, EPS, scale=scale, norm=norm)]
        if spec.op == "add + norm":
            return [*ops.add_norm(*rows, norm=norm)]
        return [ops.rms_norm(rows[0], norm)]

    return bench.leaves(shared), bench.leaves(rows), call


def passes(spec: Spec) -> byte_model.Passes:
    """The fewest passes of an op whose sources have later readers."""
    n, S = spec.n, spec.S
    return {
        "read": byte_model.Passes(n + 1, 3 * n + 1),
        "read, no norm": byte_model.Passes(n + 1, 2 * n + 1),
        "read, prior": byte_model.Passes(n + 2, 3 * n + 3),
        "phase 1": byte_model.Passes(n + S, 3 * n + S),
        "phase 1, norm": byte_model.Passes(n + S, 3 * n + S),
        "phase 2": byte_model.merge(),
        "phase 2, first": byte_model.merge(first=True),
        "add + norm": byte_model.add_norm(),
        "norm": byte_model.norm(),
    }[spec.op]


def directions_of(outputs: Sequence[Tensor]) -> list[Tensor]:
    return [torch.randn(t.shape, device=t.device).to(t.dtype) for t in outputs]


def check(spec: Spec) -> dict[str, Any]:
    """The largest relative error of outputs and gradients to fp64 on the same inputs. Whatever the op allocates is NaN
    before it is written. Raises RuntimeError beyond the tolerance."""
    bench = open_bench(spec.dtype)
    shared, rows, call = inputs(bench, spec)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills uninitialised memory with NaN
    try:
        outputs = call(shared, rows)
        directions = directions_of(outputs)
        gradients = torch.autograd.grad(outputs, [*shared, *rows], directions)
    finally:
        torch.use_deterministic_algorithms(False)
    expected = truth(call, shared, rows, directions, tokens_at_once=128)  # others use the device too
    error, tolerance = timing.disagreement([*outputs, *gradients], expected), TOLERANCE[bench.dtype]
    if not error <= tolerance:
        raise RuntimeError(f"disagrees with fp64: relative error {error:.2g}, tolerance {tolerance:.2g}")
    return {"error": error, "tolerance": tolerance}


def time_op(spec: Spec) -> dict[str, Any]:
    """Milliseconds of the device, forward and backward, launches hidden; the bytes that it has to move."""
    bench = open_bench(_dtype(spec))
    shared, rows, call = inputs(bench, spec)
    with torch.no_grad():
        directions = directions_of(call(shared, rows))
    leaves = [*shared, *rows]
    variant = Variant(lambda: call(shared, rows), leaves, directions, None, None)
    moved = bench.moved(passes(spec), spec.tokens, spec.width)
    return {**_timed({"attnres": variant}, bench, spec.repeats)["attnres"], "moved": moved}


def _dtype(spec: Spec) -> str:
    return spec.dtype if torch.cuda.is_available() else "float32"


def _timed(variants: dict[str, Variant], bench: Bench, repeats: int) -> dict[str, Any]:
    for variant in variants.values():
        variant.watches = {part: timing.Stopwatch(bench.device) for part in ("forward", "backward")}
        outputs = variant.forward()
        if not all(bool(t.isfinite().all()) for t in [*outputs, *variant.backward(outputs)]):
            raise RuntimeError("a result is not finite")
        del outputs
    times = timing.interleave({name: v.run for name, v in variants.items()}, repeats)
    return {name: {part: timing.spread(values) for part, values in parts.items()} for name, parts in times.items()}


def time_path(spec: Spec) -> dict[str, Any]:
    """A network whose layers are their norms, forward and backward, beside prenorm's."""
    bench = open_bench(_dtype(spec))
    width, L = spec.width, spec.L
    attention = FullAttnRes(width, L) if spec.op == "path, Full" else BlockAttnRes(width, L, block_size=spec.S)
    with torch.no_grad():
        for row in range(L + 1):
            attention.pseudo_query[row], attention.key_norm[row] = bench.vectors(width)
    variants, (embedding,) = {}, bench.leaves(bench.rows(spec.tokens, width))
    (direction,) = bench.rows(spec.tokens, width)
    for name, residual in (("attnres", attention), ("prenorm", PreNorm(width, L))):
        path = Path(residual, width, L, bench.dtype).to(bench.device)
        leaves = [*path.parameters(), embedding]
        variants[name] = Variant(lambda path=path: [path(embedding)], leaves, [direction], None, None)
    models = {"prenorm": byte_model.standard(L, 1), "attnres": byte_model.full_two_phase(L, width)}
    if spec.S:
        models["attnres"], models["floor"] = byte_model.two_phase(L, spec.S, width), byte_model.least(L, spec.S)
    moved = {name: bench.moved(model, spec.tokens, width) for name, model in models.items()}
    return {"rows": _timed(variants, bench, spec.repeats), "moved": moved}


def published(spec: Spec, rival: str | None = None) -> dict[str, Any]:
    """Microseconds of a read forward, without norm and gradients, as a graph of calls over inputs that rotate."""
    bench = open_bench(_dtype(spec), [rival] if rival else [])
    moved = bench.moved(byte_model.Passes(spec.n + 1, 0), spec.tokens, spec.width)[0]
    copies = min(24, int(L2_BYTES / moved) + 1) if bench.device.type == "cuda" else 1
    query, key_norm = bench.vectors(spec.width)
    sets = [bench.rows(spec.tokens, spec.width, spec.n) for _ in range(copies)]

    def call(sources: list[Tensor]) -> Any:
        if rival is None:
            return ops.depth_attention(query, sources, key_norm, EPS)
        read = bench.rivals[rival].read
        assert read is not None
        return read(query, sources, key_norm, EPS, None)

    with torch.no_grad(), timing.parallel_autotuning():
        calls = [lambda sources=sources: call(sources) for sources in sets]
        microseconds = graph_times(calls, spec.repeats, bench.device)
    return {"us": timing.spread(microseconds), "moved": moved, "sets": copies}


def graph_times(
    calls: Sequence[Callable[[], Any]], repeats: int, device: torch.device, fewest: int = 20
) -> list[float]:
    """Microseconds of one of the calls, in each replay of a CUDA graph that makes them in turn."""
    for call in calls:
        call()
    if device.type != "cuda":
        return [1e3 * timing.wall(calls[0], device) for _ in range(repeats)]
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.current_stream(device).wait_stream(side)
    turns = [calls[i % len(calls)] for i in range(max(fewest, len(calls)))]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [call() for call in turns]  # kept, so that each writes memory of its own
    watch = timing.Stopwatch(device)
    times = [1e3 * watch(graph.replay)[1] / len(turns) for _ in range(repeats + 3)][3:]
    del results
    return times


# Decoding, and rivals


def decode(batch: int, quick: bool) -> dict[str, Any]:
    """Milliseconds of a decoded token in a CUDA graph (on a CPU: a call), and the ratio to the standard residual."""
    bench = open_bench()
    shape = inference.Shape(width=32 if quick else 1024, blocks=2 if quick else 24, dtype=str(bench.dtype)[6:])
    names = {title: inference.RESIDUALS[title] for title in ("standard", "Block", "Full")}
    models = inference.make(shape, bench.device, names)
    measure = inference.replay if bench.device.type == "cuda" else inference.decode
    times = measure(models, batch, 3 if quick else 40, bench.device)
    standard = times["standard"]["ms"]
    return {
        title: {
            **timing.spread(parts["ms"]),
            "ratio": median(a / b for a, b in zip(parts["ms"], standard, strict=True)),
        }
        for title, parts in times.items()
    }


RIVALS = {
    "flash-attn-res": ("path", "phase 1", "phase 2"),
    "fla Triton": ("path", "read"),
    "fla Gluon": ("path", "read"),
    "liger-kernel": ("path", "read"),
    "fast-attnres": ("path", "read", "phase 1"),
    "straightforward": ("path", "read"),
}


def against(rival: str, case: str, tokens: int, quick: bool) -> dict[str, Any]:
    """A rival beside this library on the same inputs, after both agreed with fp64."""
    bench = open_bench("bfloat16" if torch.cuda.is_available() else "float32", [rival])
    width, L, S, n = (32, 4, 2, 3) if quick else (2048, 32, 8, 9)
    whole = [f"{rival}, one function"] if bench.rivals[rival].path else []
    build = {
        "path": lambda: residual_path(bench, tokens, width, L, S, [rival, *whole]),
        "phase 1": lambda: cases.phase_1(bench, tokens, width, 2 if quick else 4, S),
        "phase 2": lambda: cases.phase_2(bench, tokens, width),
        "read": lambda: cases.read(bench, tokens, width, n),
    }[case]()
    with timing.parallel_autotuning():
        rows = ops_script.measure(build, bench, timing.Budget(3600), 3600, 2 if quick else 10)
    if not any(name.startswith(rival) for name in rows):
        raise RuntimeError("; ".join(build.left_out.values()))
    return {"title": build.title, "rows": rows, "left out": build.left_out}
