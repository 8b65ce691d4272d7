"""What the Triton kernels compile to for GPUs that need not be here: registers, spills, shared memory, wide loads.

    PYTHONPATH=src python benchmarks/compile_targets.py            # every case for sm_80, sm_90, sm_100; ten minutes
    PYTHONPATH=src python benchmarks/compile_targets.py --quick    # the cases that the tests watch, for sm_90

The ops run on meta tensors and their launches are recorded, so what is compiled is what a GPU would be given. From the
cubin: registers and bytes of stack (spills) a thread. From the PTX: loads from global memory of 16 bytes, plain or
asynchronous, and loads of 2 bytes, which in bf16 are those that lost their width.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from attnres.ops.triton import launch as triton_launch
from attnres.ops.triton.inter_block import inter_block
from attnres.ops.triton.inter_block_backward import inter_block_gradients, rows_fit
from attnres.ops.triton.merge import merge, merge_gradients
from attnres.ops.triton.norm import add_norm, add_norm_gradients
from attnres.ops.triton.read import read, read_gradients

TOKENS = 16384
ARCHITECTURES = (80, 90, 100)
SHARED_MEMORY = 227 * 1024
"""Bytes that a program may have on sm_90."""

OPTIONS = ("num_warps", "num_stages", "maxnreg", "enable_fp_fusion")
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int64: "i64"}
TOOL = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


class Shape(NamedTuple):
    """D, sources of a read or of phase 1, queries of a block."""

    width: int
    sources: int
    queries: int


SHAPES = (
    Shape(512, 4, 3),
    Shape(1024, 4, 4),
    Shape(2048, 4, 4),
    Shape(2048, 4, 8),
    Shape(2304, 9, 6),
    Shape(7168, 8, 24),
)
"""Up to four queries phase 1 holds in registers, with the first read's norm; more have a kernel of their own."""
LONG_LIST = Shape(2048, 32, 4)
"""More sources than fit a kernel's arguments."""

WATCHED = (Shape(1024, 4, 4), Shape(2304, 9, 6))
"""Both forms of phase 1, two tiles of sources, a width that is no power of two."""


class Launch(NamedTuple):
    kernel: JITFunction
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    parser.add_argument("--quick", action="store_true", help="only print the watched cases for sm_90, as JSON")
    arguments = parser.parse_args()
    if arguments.quick:
        print(json.dumps([measure(case, launch, 90) for case, launch in cases(WATCHED)]))
        return
    rows = []
    for case, launch in cases((*SHAPES, LONG_LIST)):
        for architecture in ARCHITECTURES:
            rows.append(measure(case, launch, architecture))
            print(" ".join(f"{key}={value}" for key, value in rows[-1].items()), flush=True)
    results = {"command": "benchmarks/compile_targets.py", "triton": triton.__version__, "rows": rows}
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "compile_targets.json").write_text(json.dumps(results, indent=1) + "\n")
    (arguments.out / "compile_targets.md").write_text(markdown(results))


def cases(shapes: tuple[Shape, ...]) -> Iterator[tuple[dict[str, Any], Launch]]:
    """Every launch of every op, once: {kernel, width, sources, queries} and what was launched."""
    seen = set()
    for shape in shapes:
        for call, counts in operations(shape):
            for launch in launches(call):
                name = launch.kernel.fn.__name__
                if name == "pack_addresses" or (name == "reduce_partials" and "queries" not in counts):
                    continue
                case = {"kernel": name, "width": shape.width, "sources": None, "queries": None} | counts
                case |= {"sources": None} if name == "reduce_partials" else {}
                if tuple(case.values()) not in seen:
                    seen.add(tuple(case.values()))
                    yield case, launch


def operations(shape: Shape) -> Iterator[tuple[Callable[[], Any], dict[str, Any]]]:
    """Calls of all ops for a shape, bf16 sources and parameters, each with what it depends on beside the width."""
    width, n, queries = shape

    def row(*leading: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(*leading, dtype=dtype, device="meta")

    def numbers(*shape: int) -> Tensor:
        return row(*shape, dtype=torch.float32)

    sources = [row(TOKENS, width) for _ in range(n)]
    x, q, lse = sources[0], row(width), numbers(TOKENS)
    s, norm, scale = row(queries, width), (1e-6, 1e-6), 2.0
    stats = numbers(TOKENS, 2 * n + 2)
    # the outputs of a layer's own group are few; its read of them goes on from phase 1's
    for prior in ((None, None), (x, lse)) if n <= 5 else ((None, None),):
        counts = {"sources": f"{n} + prior" if prior[0] is not None else n}
        yield lambda prior=prior: read(q, q, sources, *prior, q, *norm, scale), counts
        yield lambda prior=prior: read_gradients(q, q, sources, *prior, q, stats, x, sources, 1e-6, scale), counts
    folded = (q, 1e-6) if rows_fit(x, n, queries) else (None, None)  # the first read's norm
    lses, logits, rstd = numbers(queries, TOKENS), numbers(TOKENS, n, queries), numbers(TOKENS, n + 1)
    kept, counts = (lses, logits, rstd), {"sources": n, "queries": queries}
    yield lambda: inter_block(s, s, sources, folded[0], 1e-6, folded[1], scale, True), counts
    yield (
        lambda: inter_block_gradients(s, s, sources, folded[0], *kept, [x] * queries, lses, sources, folded[1], scale),
        counts,
    )
    stats_of_merge = numbers(TOKENS, 3)
    yield lambda: merge(q, q, x, x, x, lse, q, *norm, scale), {}
    yield lambda: merge_gradients(q, q, x, x, lse, q, stats_of_merge, x, x, 1e-6, scale), {}
    yield lambda: add_norm(x, x, q, 1e-6), {}
    yield lambda: add_norm_gradients(x, q, lse, x, x), {}


def launches(call: Callable[[], Any]) -> list[Launch]:
    """The kernel launches of a call, none of which happens."""
    recorded: list[Launch] = []

    def record(kernel: JITFunction, *arguments: Any, grid: Any, warmup: bool, **keywords: Any) -> None:
        recorded.append(Launch(kernel, arguments, keywords))

    with mock.patch.object(JITFunction, "run", record), mock.patch.object(triton_launch, "multiprocessors", _an_h100):
        call()
    return recorded


def _an_h100(device: torch.device) -> int:
    return 132


def measure(case: dict[str, Any], launch: Launch, architecture: int) -> dict[str, Any]:
    """Compiles a launch and reads what came of it."""
    options = {key: value for key, value in launch.keywords.items() if key in OPTIONS}
    given = {key: value for key, value in launch.keywords.items() if key not in OPTIONS}
    given |= dict(zip(launch.kernel.arg_names, launch.arguments, strict=False))
    types = {name: kind(given[name], launch.kernel, name) for name in launch.kernel.arg_names}
    source = ASTSource(
        fn=launch.kernel,
        signature=types,
        constexprs={name: given[name] for name, name_type in types.items() if name_type == "constexpr"},
        attrs={key: [["tt.divisibility", 16]] for key in pointers(types)},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    registers, stack = resources(compiled.asm["cubin"])
    ptx = compiled.asm["ptx"]
    return {
        **case,
        "architecture": f"sm_{architecture}",
        "warps": options["num_warps"],
        "registers": registers,
        "spill_bytes": stack,
        "shared_bytes": compiled.metadata.shared,
        "wide_loads": len(re.findall(r"ld\.global[.\w:]*\.v4\.b32|ld\.global[.\w:]*\.v2\.b64|cp\.async\.cg", ptx)),
        "narrow_loads": len(re.findall(r"ld\.global[.\w:]*\.b16 ", ptx)),
        "barriers": len(re.findall(r"bar\.sync|barrier\.sync", ptx)),
    }


def kind(value: Any, kernel: JITFunction, name: str) -> Any:
    """A value's type in a kernel's signature."""
    if value is None or kernel.params[kernel.arg_names.index(name)].is_constexpr:
        return "constexpr"
    if isinstance(value, tuple):
        return tuple(kind(element, kernel, name) for element in value)
    if isinstance(value, Tensor):
        return "*" + NAMES[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


def pointers(types: dict[str, Any]) -> Iterator[tuple[int, ...]]:
    """Where the pointers of a signature are."""
    for i, name_type in enumerate(types.values()):
        if isinstance(name_type, tuple):
            yield from ((i, j) for j in range(len(name_type)))
        elif name_type.startswith("*"):
            yield (i,)


def resources(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of stack) a thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([TOOL, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, f"cuobjdump says nothing of registers: {usage}"
    return int(found[1]), int(found[2])


def markdown(results: dict[str, Any]) -> str:
    """The table, a line a case, with a column of registers an architecture."""
    lines = [
        f"Compiled by Triton {results['triton']}, T = {TOKENS}, bf16. Registers a thread (+ bytes spilled) for each",
        "architecture; shared memory, 16-byte loads, loads that lost their width and barriers are those of sm_90.",
        "",
        "|kernel|D|n|S|warps|sm_80|sm_90|sm_100|shared|wide loads|narrow loads|barriers|",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    cells: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in results["rows"]:
        key = tuple(row[name] for name in ("kernel", "width", "sources", "queries"))
        spilled = f" + {row['spill_bytes']}" if row["spill_bytes"] else ""
        cells.setdefault(key, {})[row["architecture"]] = f"{row['registers']}{spilled}"
        if row["architecture"] == "sm_90":
            cells[key] |= row
    for (kernel, width, sources, queries), row in sorted(cells.items(), key=lambda item: item[0][:2]):
        before = [kernel, width, sources or "", queries or "", row["warps"], row["sm_80"], row["sm_90"], row["sm_100"]]
        after = [row[name] for name in ("shared_bytes", "wide_loads", "narrow_loads", "barriers")]
        lines.append("|" + "|".join(map(str, [*before, *after])) + "|")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
