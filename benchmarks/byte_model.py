"""How many bytes a residual path moves through device memory in one training step, by design.

    python benchmarks/byte_model.py                 # the tables of docs/performance.md

The unit is a pass: one [T, D] tensor read or written once, T * D * 2 bytes in bf16. The path runs from a layer's output
to the next layer's normalised input, in front of the output head too; what layers move themselves is not counted, nor
are scalars per token unless they add up. A GPU's caches are taken to hold a token's rows within a kernel and nothing
from one kernel to the next. The tests count what this library's kernels load and store: what is said of them here.

L layers in blocks of S; a block's first layer reads the n finished blocks (the embedding is one), later ones the
block's partial sum too, m sources in all.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

ADD = 3  # reads two, writes one: a sum, or autograd joining two gradients of one tensor
NORM, NORM_BACKWARD = 2, 3

# what it costs a source's reader to join its gradient with that of later readers
AUTOGRAD = ADD
CHAINED = 1  # the kernel that writes the gradient adds what it was handed

FEW_QUERIES, FEW_SOURCES = 4, 12  # for so many at most phase 1 holds all rows of a token in registers, up to D=4096


class Passes(NamedTuple):
    forward: float
    backward: float

    @property
    def total(self) -> float:
        return self.forward + self.backward

    def bytes(self, tokens: int, width: int, itemsize: int = 2) -> tuple[float, float]:
        return self.forward * tokens * width * itemsize, self.backward * tokens * width * itemsize


def blocks(L: int, S: int) -> list[tuple[int, int]]:
    """(finished blocks that it reads, its layers) of every block; the last one may be short."""
    return [(index + 1, min(S, L - first)) for index, first in enumerate(range(0, L, S))]


# One operation of this library


def norm() -> Passes:
    """One in, one out; back: dx and h in, one out. Sums over tokens for the weight stay in registers."""
    return Passes(NORM, NORM_BACKWARD)


def add_norm() -> Passes:
    """stream + update and its norm: two in, two out; back: dx, sum, later gradient in, one out."""
    return Passes(4, 4)


def read(m: int, join: float = 0, prior: bool = False) -> Passes:
    """One read of m sources and its norm; back: the sources and dx in, their gradients out. join: AUTOGRAD or CHAINED
    if the sources have later readers. prior: it goes on from phase 1's read, one more row in; back: in, its gradient
    out."""
    return Passes(m + prior + 1, (2 + join) * m + 2 * prior + 1)


def inter_block(n: int, queries: int, join: float = 0, normed: bool = False) -> Passes:
    """Phase 1: finished blocks in, a read a query out; back: blocks and gradients of reads in, n gradients out. One
    block is its own read, which is not written. normed: the norm of the first read too.

    Beyond FEW_QUERIES and FEW_SOURCES the blocks are read again for the gradients of the queries, and the norm is a
    kernel of its own.
    """
    few = queries <= FEW_QUERIES and n <= FEW_SOURCES
    written = queries if n > 1 else normed and few
    apart = norm() if normed and not few else Passes(0, 0)
    return Passes(n + written + apart.forward, (2 + join + (not few)) * n + queries + apart.backward)


def merge(first: bool = False) -> Passes:
    """Phase 2 with the pending sum and the norm: partial sum, update and phase 1's read in, sum and x out; back: dx,
    the read, the sum and its later gradient in, two gradients out. first: the sum is the update."""
    return Passes(3 if first else 5, 6)


# Whole residual paths


def standard(L: int, S: int) -> Passes:
    """Add and norm in one kernel."""
    return Passes(L * add_norm().forward, L * add_norm().backward)


def standard_unfused(L: int, S: int) -> Passes:
    """Add, then norm; back: the norm, then autograd's sum."""
    return Passes(L * (ADD + NORM), L * (NORM_BACKWARD + ADD))


def layer_by_layer(L: int, S: int, one: Callable[[int], Passes], join: float = AUTOGRAD) -> Passes:
    """Every layer reads all its sources anew; `one` is a read of m sources with its norm.

    A tensor with k readers gets k gradients, which are joined k - 1 times, by autograd or along a chain of readers.
    """
    parts = blocks(L, S)
    sources = len(parts) + 1
    forward, backward = one(sources)
    readers = [1] * sources  # of the embedding and of every block; the read in front of the head is one
    partial_sums = 0
    for n, layers in parts:
        for j in range(layers):
            f, b = one(n + (j > 0))
            forward, backward = forward + f, backward + b
            for source in range(n):
                readers[source] += 1
        forward += ADD * (layers - 1)
        partial_sums += layers - 1  # each has two readers: its layer and the next sum
    joins = partial_sums + sum(count - 1 for count in readers)
    return Passes(forward, backward + join * joins)


def straightforward(L: int, S: int) -> Passes:
    """The paper's pseudocode in PyTorch, each operation at its best: stack, norm of the keys, two contractions.

    Forward: stack 2m, norm 2m, logits m, sum m + 1. Back: weights' gradient m + 1, two parts of the values' gradient m
    each, query's m, norm 3m, their sum 3m.
    """
    return layer_by_layer(L, S, lambda m: Passes(6 * m + 1 + NORM, 10 * m + 1 + NORM_BACKWARD))


def per_read(L: int, S: int, partials: float = 8) -> Passes:
    """A fused read with its norm, alone in autograd (flash-linear-attention).

    partials: what the sums over tokens for the gradients of query and norm cost: 8 for two [T, D] tensors in fp32,
    written and read again (its Triton kernels); 0.25 for one row each 32 tokens (its Gluon kernels).
    """
    return layer_by_layer(L, S, lambda m: Passes(m + 1, 2 * m + 1 + partials))


def per_read_chained(L: int, S: int) -> Passes:
    """A fused read that hands its sources on: what this library does for lean states, of Full AttnRes (S = 1) too. The
    first layer's read is the embedding itself, which autograd joins with the chain."""
    forward, backward = layer_by_layer(L, S, read, join=CHAINED)
    return Passes(forward, backward + AUTOGRAD - CHAINED)


def two_phase_recomputed(L: int, S: int, norms: bool = True) -> Passes:
    """Two phases without fused sums and norms, everything recomputed in backward, fp32 scratch (flash-attn-res)."""
    parts = blocks(L, S)
    sources = len(parts) + 1
    forward: float = 2 + sources + 1  # the embedding enters the bank; the read in front of the head
    backward: float = 2 * sources + 1 + 4  # that read's gradients, the query's in fp32 written and read
    for n, s in parts:
        once = n + s + ADD * (s - 1) + 2 + ADD * (s - 1)  # phase 1, merges, first output copied, others added
        forward += once + NORM * s * norms
        backward += once  # recomputed
        backward += 3 * s  # each layer's gradient to fp32
        backward += ADD * (s - 1) + 8 * (s - 1) + 4  # partial sum undone; merges and the first copy in fp32
        backward += 3 * n + 4 * s + 2 * s  # phase 1: blocks, their gradients in and out; reads' and queries' in fp32
        backward += (NORM + NORM_BACKWARD) * s * norms
    return Passes(forward, backward)


def two_phase(L: int, S: int, width: int, chained: bool = True) -> Passes:
    """Two phases with sums and norms fused, sources handed on from block to block (this library).

    chained=False: each phase 1 writes gradients of its own, which autograd joins.
    """
    forward, backward = two_phase_rows(L, S, CHAINED if chained else AUTOGRAD)
    return Passes(forward, backward + sums_and_scalars(blocks(L, S), width))


def sums_and_scalars(parts: list[tuple[int, int]], width: int) -> float:
    """Partial sums of the queries' gradients; scalars of a source and a query in fp32."""
    return sum(0.13 * s + 16 * n * s / (2 * width) for n, s in parts)


def two_phase_rows(L: int, S: int, join: float = CHAINED) -> Passes:
    """The same without what is summed over tokens and scalars. The first block is read layer by layer, which moves as
    much; a block's last sum is formed when it is written."""
    parts = blocks(L, S)
    s = parts[0][1]
    steps = [norm(), *(read(2, join) for _ in range(s - 1))]
    forward, backward = ADD * (s - 1.0), float(AUTOGRAD)  # the embedding's norm and its next reader
    for n, s in parts[1:]:
        steps += [inter_block(n, s, join, normed=True), *(merge(first=j == 1) for j in range(1, s))]
        forward += ADD * (s > 1)
    steps.append(read(len(parts) + 1))  # in front of the head
    return Passes(forward + sum(step.forward for step in steps), backward + sum(step.backward for step in steps))


def groups(L: int, size: int | None = None) -> list[tuple[int, int]]:
    """Full AttnRes in two phases: (the embedding and outputs before it, its layers) of every group; size: the layers in
    a group, by default a divisor of L from sqrt(L) to 1.5 sqrt(L), or the root, rounded up."""
    root = math.isqrt(L - 1) + 1
    size = size or next((s for s in range(root, int(1.5 * math.sqrt(L)) + 1) if L % s == 0), root)
    return [(first + 1, min(size, L - first)) for first in range(0, L, size)]


def full_two_phase(L: int, width: int) -> Passes:
    """Full AttnRes in two phases, sources handed on from reader to reader (this library)."""
    forward, backward = full_two_phase_rows(L)
    return Passes(forward, backward + sums_and_scalars(groups(L), width))


def full_two_phase_rows(L: int, layerwise_first: bool = True, size: int | None = None) -> Passes:
    """The same without what is summed over tokens and scalars. Phase 1 reads what came before a group, once; a later
    layer's read of the group's own outputs goes on from it.

    layerwise_first: the first group, which has the embedding alone before it, is read layer by layer (this library's
    choice where nothing else is asked for). The embedding's norm and its next reader are then joined by autograd.
    """
    steps, joins = [], 0
    for n, s in groups(L, size):
        if n == 1 and layerwise_first:
            steps += [norm(), *(read(j + 1, CHAINED) for j in range(1, s))]
            joins += AUTOGRAD
        else:
            steps += [inter_block(n, s, CHAINED, normed=True), *(read(j, CHAINED, prior=True) for j in range(1, s))]
    steps.append(read(L + 1))  # in front of the head
    return Passes(sum(step.forward for step in steps), joins + sum(step.backward for step in steps))


def inference_rows(L: int, S: int, few_tokens: bool = False) -> float:
    """Forward passes without gradients. Phase 1 opens the first block too: that the pending sum is in the merge saves
    more than the embedding costs. few_tokens: as in decoding, where the first read always comes with its norm."""
    passes = 0.0
    for n, s in blocks(L, S):
        passes += ADD * (s > 1)
        passes += n + (s if n > 1 else 1) if few_tokens else inter_block(n, s, normed=True).forward
        passes += sum(merge(first=j == 1).forward for j in range(1, s))
    return passes + read(len(blocks(L, S)) + 1).forward


def least(L: int, S: int) -> Passes:
    """No kernel can do with less: as `standard`, and a block's sources read once each way, their gradients written
    once."""
    parts = blocks(L, S)
    sources = len(parts) + 1
    forward, backward = sources + 1, 2 * sources + 1
    for n, s in parts:
        forward += n + 1 + 2 * (s > 1) + 4 * max(0, s - 2) + ADD
        backward += 2 * n + 1 + 4 * (s - 1)
    return Passes(forward, backward)


# Tables

SHAPES = ((2048, 32, 8), (2304, 54, 6), (7168, 186, 24))  # width, layers, layers in a block
DESIGNS: dict[str, Callable[[int, int, int], Passes]] = {
    "standard residual, add + norm fused": lambda D, L, S: standard(L, S),
    "standard residual, add, then norm": lambda D, L, S: standard_unfused(L, S),
    "straightforward PyTorch, at its best": lambda D, L, S: straightforward(L, S),
    "fused read (flash-linear-attention, Triton)": lambda D, L, S: per_read(L, S),
    "fused read (flash-linear-attention, Gluon)": lambda D, L, S: per_read(L, S, partials=0.25),
    "two-phase, recomputed (flash-attn-res)": lambda D, L, S: two_phase_recomputed(L, S),
    "fused read, chained": lambda D, L, S: per_read_chained(L, S),
    "two-phase fused, autograd's sums": lambda D, L, S: two_phase(L, S, D, chained=False),
    "**two-phase fused, chained**": lambda D, L, S: two_phase(L, S, D),
    "least possible": lambda D, L, S: least(L, S),
    "Full AttnRes, fused read, chained": lambda D, L, S: per_read_chained(L, 1),
    "Full AttnRes in two phases": lambda D, L, S: full_two_phase(L, D),
}


def table(width: int, L: int, S: int, tokens: int = 16384, bandwidth: float = 3e12, flops: float = 320e12) -> str:
    """Markdown: per layer and per step, at `bandwidth` bytes/s. Percent of the time of the layers themselves, counted
    as 36 T D^2 operations a layer (dense Transformer, forward and backward) at `flops` operations/s."""
    layers_ms = 1e3 * 36 * tokens * width**2 * L / flops
    lines = [
        f"D={width}, L={L}, S={S}, {tokens} tokens, bf16: a pass is {tokens * width * 2 / 1e6:.0f} MB",
        "",
        "| design | passes per layer, forward + backward | MB per layer | GB per step | ms per step | of the layers |",
        "|---|---|---|---|---|---|",
    ]
    for name, design in DESIGNS.items():
        passes = design(width, L, S)
        forward, backward = passes.bytes(tokens, width)
        ms = 1e3 * (forward + backward) / bandwidth
        lines.append(
            f"| {name} | {passes.forward / L:.1f} + {passes.backward / L:.1f} "
            f"| {forward / L / 1e6:.0f} + {backward / L / 1e6:.0f} "
            f"| {(forward + backward) / 1e9:.1f} | {ms:.1f} | {100 * ms / layers_ms:.1f} % |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    print("\n\n".join(table(*shape) for shape in SHAPES))
