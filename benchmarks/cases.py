"""What benchmarks/ops.py times: single ops, each with all its implementations on the same inputs, and their truth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import byte_model
import timing
import torch
from torch import Tensor

from attnres import ops
from attnres.bench import rivals

EPS = 1e-6
TOLERANCE = {torch.bfloat16: 0.03, torch.float32: 1e-3}  # relative, of one op


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


def phase_1(bench: Bench, tokens: int, width: int, n: int, queries: int) -> Case:
    """All reads of a block over n finished blocks."""
    least = byte_model.Passes(n + queries, 2 * n + queries)  # who makes the queries' gradients apart moves n more
    fewest = bench.moved(least, tokens, width)
    chained = bench.moved(least._replace(backward=3 * n + queries), tokens, width)
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
        outs, lses, readers = ops.inter_block_chained(vectors[0], sources, vectors[1], EPS)
        return [*outs, *lses, *readers]

    variants = {
        "attnres": variant(ops.inter_block, sources),
        "attnres, chained": Variant(handed_on, [*vectors, *sources], [*douts, *dlses, *later], chained, None),
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
    return same_inputs(f"phase 2, T={tokens} D={width}", ours, calls, vectors, rows, directions, moved)


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
    return same_inputs(f"read, T={tokens} D={width} n={n}", ours, calls, vectors, rows, directions, moved)


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
    return same_inputs(f"add + norm, T={tokens} D={width}", ours, calls, vectors, rows, directions, moved)


def same_inputs(
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
