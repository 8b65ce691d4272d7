"""Depth attention op by op, beside every rival that is installed, against the copy rate of the device.

    PYTHONPATH=src python benchmarks/ops.py                       # one process, under ten minutes
    PYTHONPATH=src python benchmarks/ops.py --quick --device cpu  # seconds, to see that it works

Whole residual paths, the two phases and single reads, forward and backward. Whatever is timed first has to agree with
the reference in fp64, outputs and all gradients; who does not, or cannot be imported, launched or tuned in time, is
listed with the reason. Medians over interleaved repeats of the device's own time (launching from Python is not in it;
benchmarks/training.py shows what is). The most important cases come first and results are saved after each.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path as File
from typing import Any

import byte_model
import rivals
import timing
import torch
from torch import Tensor, nn
from torch.func import functional_call

from attnres import ops
from attnres.residual import BlockAttnRes, PreNorm
from attnres.train import hardware

EPS = 1e-6
TOLERANCE = {torch.bfloat16: 0.03, torch.float32: 1e-3}  # of one op
PATH_TOLERANCE = 3  # times that, for dozens of ops in a row (the reference itself in bf16 is at 0.03)
ROUNDS_BEFORE_TIMING = 3


@dataclass
class Variant:
    """One implementation on its inputs. `moved`: bytes forward and backward, None where the byte model has no word;
    `truth`: outputs and gradients to agree with, None for what is no rival."""

    forward: Callable[[], Sequence[Tensor]]
    leaves: list[Tensor]
    directions: list[Tensor]
    moved: tuple[float, float] | None
    truth: Callable[[], list[Tensor]] | None
    watches: dict[str, timing.Stopwatch] = field(default_factory=dict)

    def backward(self, outputs: Sequence[Tensor]) -> Sequence[Tensor]:
        return torch.autograd.grad(outputs, self.leaves, self.directions, materialize_grads=True)

    def run(self) -> dict[str, float]:
        outputs, forward = self.watches["forward"](self.forward)
        _, backward = self.watches["backward"](lambda: self.backward(outputs))
        return {"forward": forward, "backward": backward}

    def error(self) -> float:
        """Largest relative error of outputs and gradients. A gradient of a bank of sources is compared by source."""
        outputs = self.forward()
        got = [*outputs, *self.backward(outputs)]
        assert self.truth is not None
        truth = self.truth()
        if len(got) < len(truth):
            *got, bank = got
            got += bank.unbind(0)
        return timing.disagreement(got, truth)


@dataclass
class Case:
    title: str
    variants: dict[str, Variant]
    tolerance: float
    left_out: dict[str, str] = field(default_factory=dict)


@dataclass
class Bench:
    """What every case needs to know."""

    device: torch.device
    dtype: torch.dtype
    rivals: dict[str, rivals.Rival]
    compiled: bool

    def rows(self, tokens: int, width: int, count: int = 1) -> list[Tensor]:
        return [torch.randn(tokens, width, device=self.device, dtype=self.dtype) for _ in range(count)]

    def leaves(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [t.detach().requires_grad_() for t in tensors]

    def vectors(self, *shape: int) -> tuple[Tensor, Tensor]:
        """Pseudo-queries with logits of about unit size, key norms about one."""
        query = torch.randn(*shape, device=self.device) / shape[-1] ** 0.5
        return query, 1 + 0.1 * torch.randn(*shape, device=self.device)

    def moved(self, passes: byte_model.Passes, tokens: int, width: int) -> tuple[float, float]:
        return passes.bytes(tokens, width, self.dtype.itemsize)


def truth(
    function: Callable[[list[Tensor], list[Tensor]], Sequence[Tensor]],
    shared: Sequence[Tensor],
    rows: Sequence[Tensor],
    directions: Sequence[Tensor],
    tokens_at_once: int = 512,
) -> list[Tensor]:
    """Outputs of function(shared, rows) and gradients of both, in fp64 by the reference backend, stored in fp32.

    Tokens are independent of each other, so they go through in chunks.
    """
    chosen = ops.backend()
    ops.set_backend("reference")
    try:
        shared = [t.detach().double().requires_grad_() for t in shared]
        sums = [torch.zeros_like(t) for t in shared]
        outputs, gradients = [], []
        for part in torch.arange(len(rows[0])).split(tokens_at_once):
            chunk = slice(int(part[0]), int(part[-1]) + 1)
            leaves = [t.detach()[chunk].double().requires_grad_() for t in rows]
            results = function(list(shared), leaves)
            grads = torch.autograd.grad(results, [*shared, *leaves], [d[chunk].double() for d in directions])
            outputs.append([t.detach().float() for t in results])
            gradients.append([t.float() for t in grads[len(shared) :]])
            for total, grad in zip(sums, grads, strict=False):
                total += grad
    finally:
        ops.set_backend(chosen)
    return [
        *(torch.cat(parts) for parts in zip(*outputs, strict=True)),
        *sums,
        *(torch.cat(parts) for parts in zip(*gradients, strict=True)),
    ]


# Cases


class Path(nn.Module):
    """A network whose layers are their norms: what is left is its residual path. The norms' weights differ widely, or
    all sources would be parallel and the queries without effect."""

    def __init__(self, residual: nn.Module, width: int, num_layers: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.residual = residual
        self.norms = nn.ModuleList(nn.RMSNorm(width, EPS, dtype=dtype) for _ in range(num_layers + 1))
        for norm in self.norms:
            nn.init.normal_(norm.weight)

    def forward(self, embedding: Tensor) -> Tensor:
        state = self.residual.start(embedding)
        for i, norm in enumerate(self.norms[:-1]):
            x, state = self.residual.read(state, i, norm)
            state = self.residual.write(state, i, x)
        return self.residual.finish(state, self.norms[-1])


def residual_path(bench: Bench, tokens: int, width: int, L: int, S: int, contenders: Sequence[str]) -> Case:
    """Norms included, embedding to the output head's norm; the sublayers between are left out."""
    block = BlockAttnRes(width, L, block_size=S).to(bench.device)
    with torch.no_grad():
        for row in range(L + 1):
            block.pseudo_query[row], block.key_norm[row] = bench.vectors(width)
    prenorm = Path(PreNorm(width, L), width, L, bench.dtype).to(bench.device)
    ours = Path(block, width, L, bench.dtype).to(bench.device)
    (embedding,), (direction,) = bench.leaves(bench.rows(tokens, width)), bench.rows(tokens, width)

    @cache
    def expected() -> list[Tensor]:
        exact = copy.deepcopy(ours).double()
        exact.residual.schedule = "layerwise"
        names, values = zip(*ours.named_parameters(), strict=True)

        def function(shared: list[Tensor], rows: list[Tensor]) -> list[Tensor]:
            return [functional_call(exact, dict(zip(names, shared, strict=True)), (rows[0],))]

        return truth(function, values, [embedding], [direction])

    def variant(path: nn.Module, passes: byte_model.Passes | None, call: Any = None, check: bool = True) -> Variant:
        moved = None if passes is None else bench.moved(passes, tokens, width)
        forward = path if call is None else call
        leaves = [*path.parameters(), embedding]
        return Variant(lambda: [forward(embedding)], leaves, [direction], moved, expected if check else None)

    def plugged(rival: rivals.Rival) -> Path:
        path = copy.deepcopy(ours)
        path.residual = rivals.plug(ours.residual, rival)
        return path

    two_phase = byte_model.two_phase(L, S, width) if bench.device.type == "cuda" else None
    standard = byte_model.standard(L, S)
    variants = {"attnres": variant(ours, two_phase), "prenorm": variant(prenorm, standard, check=False)}
    models = {
        "straightforward": byte_model.straightforward(L, S),
        "fla Triton": byte_model.per_read(L, S),
        "fla Gluon": byte_model.per_read(L, S, partials=0.25),
        "fast-attnres": byte_model.per_read(L, S),
    }
    for name in contenders:
        rival = bench.rivals.get(name.removesuffix(", compiled").removesuffix(", one function"))
        if name == "attnres, compiled":
            variants[name] = variant(ours, two_phase, timing.compiled(ours))
        elif name == "prenorm, compiled":
            variants[name] = variant(prenorm, standard, timing.compiled(prenorm), check=False)
        elif rival is None:
            continue
        elif name.endswith(", one function"):
            path = copy.deepcopy(ours)
            variants[name] = variant(
                path, byte_model.two_phase_recomputed(L, S), lambda e, path=path, run=rival.path: whole(path, run, S, e)
            )
        else:
            path = plugged(rival)
            variants[name] = variant(path, models.get(name), timing.compiled(path) if "compiled" in name else None)
    return Case(f"residual path, T={tokens} D={width} L={L} S={S}", variants, PATH_TOLERANCE * TOLERANCE[bench.dtype])


def whole(path: Path, run: Callable[..., Tensor], block_size: int, embedding: Tensor) -> Tensor:
    """A path by a rival's own loop over the layers."""
    queries = path.residual.pseudo_query * path.residual.key_norm
    return path.norms[-1](run(embedding, queries, list(path.norms[:-1]), block_size, EPS))


def phase_1(bench: Bench, tokens: int, width: int, n: int, queries: int) -> Case:
    """All reads of a block over n finished blocks."""
    passes = byte_model.inter_block(n, queries)
    fewest = bench.moved(passes, tokens, width)
    chained = bench.moved(passes._replace(backward=passes.backward + n), tokens, width)
    vectors = bench.leaves(bench.vectors(queries, width))
    sources = bench.leaves(bench.rows(tokens, width, n))
    douts, later = bench.rows(tokens, width, queries), bench.rows(tokens, width, n)
    dlses = [torch.randn(tokens, device=bench.device) for _ in range(queries)]

    @cache
    def expected(lse: bool) -> list[Tensor]:
        def function(shared: list[Tensor], rows: list[Tensor]) -> list[Tensor]:
            outs, lses = ops.inter_block(shared[0], rows, shared[1], EPS)
            return [*outs, *lses] if lse else outs

        return truth(function, vectors, sources, [*douts, *dlses] if lse else douts, 256)

    def variant(op: Callable[..., Any], sources: Any, lse: bool = True) -> Variant:
        def forward() -> list[Tensor]:
            outs, lses, *_ = op(vectors[0], sources, vectors[1], EPS)
            return [*outs, *lses] if lse else outs

        rows = [sources] if isinstance(sources, Tensor) else sources
        directions = [*douts, *dlses] if lse else douts
        return Variant(forward, [*vectors, *rows], directions, fewest, lambda: expected(lse))

    def handed_on() -> list[Tensor]:
        outs, lses, readers = ops.inter_block_threaded(vectors[0], sources, vectors[1], EPS)
        return [*outs, *lses, *readers]

    variants = {
        "attnres": variant(ops.inter_block, sources),
        "attnres, threaded": Variant(handed_on, [*vectors, *sources], [*douts, *dlses, *later], chained, None),
    }
    if bench.compiled:
        variants["attnres, compiled"] = variant(timing.compiled(ops.inter_block), sources)
    for name, rival in bench.rivals.items():
        if rival.inter_block is not None:  # a bank costs no stacking, the best case
            (bank,) = bench.leaves([torch.stack([s.detach() for s in sources])])
            variants[name] = variant(rival.inter_block, bank, lse=rival.merge is not None)
    return Case(f"phase 1, T={tokens} D={width} n={n} S={queries}", variants, TOLERANCE[bench.dtype])


def phase_2(bench: Bench, tokens: int, width: int) -> Case:
    """One layer: pending sum, merge, norm."""
    moved = bench.moved(byte_model.merge(), tokens, width)
    (weight,) = bench.leaves([1 + 0.1 * torch.randn(width, device=bench.device).to(bench.dtype)])
    vectors = [*bench.leaves(bench.vectors(width)), weight]
    lse = torch.randn(tokens, device=bench.device)
    rows = bench.leaves([*bench.rows(tokens, width, 3), lse])
    directions = bench.rows(tokens, width, 2)

    def ours(query: Tensor, key_norm: Tensor, weight: Tensor, *rows: Tensor) -> tuple[Tensor, Tensor]:
        partial, update, out, lse = rows
        return ops.merge_norm(query, partial, update, key_norm, out, lse, EPS, norm=(weight, EPS))

    def theirs(rival: rivals.Rival) -> Callable[..., tuple[Tensor, Tensor]]:
        def step(query: Tensor, key_norm: Tensor, weight: Tensor, *rows: Tensor) -> tuple[Tensor, Tensor]:
            partial, update, out, lse = rows
            total = partial + update
            assert rival.merge is not None
            return total, rivals.rms_norm(rival.merge(query, total, key_norm, out, lse, EPS), (weight, EPS))

        return step

    calls = {"attnres": ours}
    if bench.compiled:
        calls["attnres, compiled"] = timing.compiled(ours)
    calls |= {name: theirs(rival) for name, rival in bench.rivals.items() if rival.merge is not None}
    return _same_inputs(f"phase 2, T={tokens} D={width}", ours, calls, vectors, rows, directions, moved)


def read(bench: Bench, tokens: int, width: int, n: int) -> Case:
    """One read of n sources, and the norm that follows."""
    moved = bench.moved(byte_model.read(n), tokens, width)
    (weight,) = bench.leaves([1 + 0.1 * torch.randn(width, device=bench.device).to(bench.dtype)])
    vectors = [*bench.leaves(bench.vectors(width)), weight]
    rows, directions = bench.leaves(bench.rows(tokens, width, n)), bench.rows(tokens, width)

    def ours(query: Tensor, key_norm: Tensor, weight: Tensor, *sources: Tensor) -> tuple[Tensor]:
        return (ops.read_norm(query, sources, key_norm, EPS, norm=(weight, EPS)),)

    def theirs(rival: rivals.Rival) -> Callable[..., tuple[Tensor]]:
        def call(query: Tensor, key_norm: Tensor, weight: Tensor, *sources: Tensor) -> tuple[Tensor]:
            assert rival.read is not None
            return (rival.read(query, sources, key_norm, EPS, (weight, EPS)),)

        return call

    calls = {"attnres": ours}
    calls |= {name: theirs(rival) for name, rival in bench.rivals.items() if rival.read is not None}
    if bench.compiled:
        calls |= {f"{name}, compiled": timing.compiled(calls[name]) for name in ("attnres", "straightforward")}
    return _same_inputs(f"read, T={tokens} D={width} n={n}", ours, calls, vectors, rows, directions, moved)


def add_norm(bench: Bench, tokens: int, width: int) -> Case:
    """The standard residual's step, what prenorm is measured with."""
    moved = bench.moved(byte_model.add_norm(), tokens, width)
    vectors = bench.leaves([1 + 0.1 * torch.randn(width, device=bench.device).to(bench.dtype)])
    rows, directions = bench.leaves(bench.rows(tokens, width, 2)), bench.rows(tokens, width, 2)

    def ours(weight: Tensor, stream: Tensor, update: Tensor) -> tuple[Tensor, Tensor]:
        return ops.add_norm(stream, update, norm=(weight, EPS))

    def plain(weight: Tensor, stream: Tensor, update: Tensor) -> tuple[Tensor, Tensor]:
        total = stream + update
        return total, rivals.rms_norm(total, (weight, EPS))

    calls = {"attnres": ours, "PyTorch": plain}
    if bench.compiled:
        calls["PyTorch, compiled"] = timing.compiled(plain)
    return _same_inputs(f"add + norm, T={tokens} D={width}", ours, calls, vectors, rows, directions, moved)


def _same_inputs(
    title: str,
    exact: Callable[..., Sequence[Tensor]],
    calls: dict[str, Callable[..., Sequence[Tensor]]],
    shared: list[Tensor],
    rows: list[Tensor],
    directions: list[Tensor],
    moved: tuple[float, float],
) -> Case:
    @cache
    def expected() -> list[Tensor]:
        return truth(lambda shared, rows: exact(*shared, *rows), shared, rows, directions)

    leaves = [*shared, *rows]
    variants = {
        name: Variant(lambda call=call: call(*leaves), leaves, directions, moved, expected)
        for name, call in calls.items()
    }
    return Case(title, variants, TOLERANCE[rows[0].dtype])


# Measuring


def copy_rate(device: torch.device, size: int) -> float:
    """Bytes per second, read and written, of copying `size` bytes."""
    source = torch.randn(size // 4, device=device)
    target, watch = torch.empty_like(source), timing.Stopwatch(device)
    times = timing.interleave({"copy": lambda: {"copy": watch(lambda: target.copy_(source))[1]}}, repeats=15)
    return 2 * size / (1e-3 * timing.spread(times["copy"]["copy"])["median"])


def measure(case: Case, bench: Bench, budget: timing.Budget, seconds_to_prepare: float, repeats: int) -> dict[str, Any]:
    """Rows by variant; a variant that cannot be prepared in time or is wrong goes to case.left_out."""
    errors = {}
    for name, variant in list(case.variants.items()):
        variant.watches = {part: timing.Stopwatch(bench.device) for part in ("forward", "backward")}

        def prepare(name: str = name, variant: Variant = variant) -> None:
            for _ in range(ROUNDS_BEFORE_TIMING):
                variant.backward(variant.forward())
            if variant.truth is not None:
                errors[name] = variant.error()
                if errors[name] > case.tolerance:
                    raise RuntimeError(f"disagrees with the reference: relative error {errors[name]:.2g}")

        if reason := timing.attempt(prepare, budget, seconds_to_prepare, bench.device):
            case.left_out[name] = reason
            del case.variants[name]
    times = timing.interleave({name: v.run for name, v in case.variants.items()}, repeats)
    return {
        name: {part: timing.spread(values) for part, values in parts.items()}
        | {"moved": case.variants[name].moved, "error": errors.get(name)}
        for name, parts in times.items()
    }


def lines_of(title: str, result: dict[str, Any], rate: float) -> list[str]:
    rows = []
    both = {name: sum(row[part]["median"] for part in ("forward", "backward")) for name, row in result["rows"].items()}
    for name, row in result["rows"].items():
        cells = [name]
        for part, moved in zip(("forward", "backward"), row["moved"] or (None, None), strict=True):
            ms = row[part]["median"]
            cells += [f"{ms:.3g}", "-" if moved is None else f"{100 * moved / (1e-3 * ms) / rate:.0f} %"]
        ratio = f"{both[name] / both['attnres']:.2f}" if "attnres" in both else "-"
        error = "-" if row["error"] is None else f"{row['error']:.1e}"
        rows.append([*cells, f"{both[name]:.3g}", ratio, error])
    header = ["", "forward ms", "of copy rate", "backward ms", "of copy rate", "both ms", "to attnres", "error"]
    left_out = [f"- {name}: {reason}" for name, reason in result["left_out"].items()]
    return [f"## {title}", "", *timing.markdown_table(header, rows), *left_out, *([""] if left_out else [])]


def cases(bench: Bench, quick: bool) -> dict[str, Callable[[], Case]]:
    """The most important first. Forward of phase 1 at the last block of each shape, where it reads most."""
    two_forms = ["fla Triton", "flash-attn-res, one function", "flash-attn-res", "straightforward"]
    others = ["fla Gluon", "fast-attnres", "liger-kernel"]
    compiled = ["attnres, compiled", "prenorm, compiled", "straightforward, compiled"] if bench.compiled else []
    if quick:
        return {
            "path": lambda: residual_path(bench, 64, 32, 4, 2, [*two_forms, *compiled]),
            "phase 1": lambda: phase_1(bench, 64, 32, 2, 2),
            "phase 2": lambda: phase_2(bench, 64, 32),
            "read": lambda: read(bench, 64, 32, 3),
            "add": lambda: add_norm(bench, 64, 32),
        }
    if bench.device.type != "cuda":
        return {
            "read": lambda: read(bench, 2048, 512, 9),
            "path": lambda: residual_path(bench, 2048, 512, 24, 3, ["straightforward", *compiled[:2]]),
            "phase 1": lambda: phase_1(bench, 2048, 512, 8, 3),
            "phase 2": lambda: phase_2(bench, 2048, 512),
            "add": lambda: add_norm(bench, 2048, 512),
        }
    return {
        "path": lambda: residual_path(bench, 16384, 2048, 32, 8, two_forms),
        "phase 1": lambda: phase_1(bench, 16384, 2048, 4, 8),
        "phase 2": lambda: phase_2(bench, 16384, 2048),
        "add": lambda: add_norm(bench, 16384, 2048),
        "read": lambda: read(bench, 16384, 2048, 9),
        "phase 1, D=2304": lambda: phase_1(bench, 16384, 2304, 9, 6),
        "phase 2, D=2304": lambda: phase_2(bench, 16384, 2304),
        "phase 1, D=7168": lambda: phase_1(bench, 8192, 7168, 8, 24),
        "phase 2, D=7168": lambda: phase_2(bench, 8192, 7168),
        "path, others": lambda: residual_path(bench, 16384, 2048, 32, 8, others),
        "read, D=7168": lambda: read(bench, 8192, 7168, 9),
        "path, compiled": lambda: residual_path(bench, 16384, 2048, 32, 8, compiled),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=File, default=timing.RESULTS, help="folder of the results")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 on CUDA, else float32")
    parser.add_argument("--budget", type=float, default=540, help="seconds; what is not reached is left out")
    parser.add_argument("--prepare", type=float, default=120, help="seconds for one variant to compile and tune")
    parser.add_argument("--repeats", type=int, default=20, help="timed repeats of every variant")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, nothing compiled: does the script work?")
    parser.add_argument("--only", nargs="+", metavar="CASE", help="cases by name, e.g. path 'phase 1'")
    arguments = parser.parse_args()
    budget = timing.Budget(arguments.budget)
    device = hardware.find_device(arguments.device)
    dtype = getattr(torch, arguments.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    torch.manual_seed(0)
    found, missing = rivals.load(device)
    bench = Bench(device, dtype, found, compiled=not arguments.quick)

    rate = copy_rate(device, 2**20 if arguments.quick else 2**30 if device.type == "cuda" else 2**27)
    about = timing.facts(device, dtype=str(dtype), repeats=arguments.repeats, rivals=versions(found))
    about["copy rate, TB/s"] = round(rate / 1e12, 4)
    document: dict[str, Any] = {**about, "missing": missing, "cases": {}, "not reached": []}
    lines = ["# Depth attention, op by op", "", ", ".join(f"{k} {v}" for k, v in about.items()), ""]
    lines += [f"- {name} left out: {reason}" for name, reason in missing.items()] + [""]
    name = f"ops_{device.type}{'_quick' if arguments.quick else ''}"
    with timing.parallel_autotuning():
        for title, build in cases(bench, arguments.quick).items():
            if arguments.only and title not in arguments.only:
                continue
            if budget.left() < 0:
                document["not reached"].append(title)
                continue
            case = build()
            rows = measure(case, bench, budget, arguments.prepare, arguments.repeats)
            result = {"rows": rows, "left_out": case.left_out}
            document["cases"][case.title] = result
            lines += lines_of(case.title, result, rate)
            print("\n".join(lines_of(case.title, result, rate)), flush=True)
            timing.save(arguments.out, name, document, lines)
            del case
            if device.type == "cuda":
                torch.cuda.empty_cache()
    if document["not reached"]:
        lines += ["Not reached in the time budget: " + ", ".join(document["not reached"])]
    timing.save(arguments.out, name, document, lines)


def versions(found: dict[str, rivals.Rival]) -> dict[str, str | None]:
    return {name: timing.version(rivals.PACKAGES[name]) for name in found if name in rivals.PACKAGES}


if __name__ == "__main__":
    main()
