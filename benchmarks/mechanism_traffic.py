"""How much memory traffic a residual connection makes: reads and writes per token and layer, in the forward pass.

    python benchmarks/mechanism_traffic.py                 # the four numbers of the paper, and a row a mechanism

The count is the one of the AttnRes paper (arXiv 2603.15031, section 4) and of mHC's (2512.24880, section 4.3), for an
average layer. It starts at a layer's output and ends at what the next layer's input norm reads; that norm, the layer
and parameters, which all tokens share, are left out. A step reads its operands and writes its results once; what is
elementwise, and sums over the width, happen inside a step. AttnRes reads a source as a key and again as a value, and
its two phases are fused as in the paper. Streams are counted as in mHC's paper, a step for each of its formulas: what a
kernel that fuses all of them could save, 4 n + 2 instead of 8 n + 2, is not in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple


class Traffic(NamedTuple):
    """width: multiples of the width D; numbers: what does not grow with D. Both per token and layer."""

    width: float
    numbers: float = 0.0

    def per_width(self, dim: int) -> float:
        """Everything, in units of D."""
        return self.width + self.numbers / dim


def standard(residual: Any) -> Traffic:
    """The stream and the output in, the stream out; factors and norms of the stream happen on the way."""
    return Traffic(3)


def x0_lambdas(residual: Any) -> Traffic:
    """As standard, with the embedding in."""
    return Traffic(3 + 1)


def highway(residual: Any) -> Traffic:
    """The gate's matrix: the stream in, the gate out. Then gate, output and stream in, the stream out."""
    return Traffic(2 + 4)


def siamesenorm(residual: Any) -> Traffic:
    """Both streams and the output in, both out; then both in and their normed sum out."""
    return Traffic(5 + 3)


def laurel(residual: Any) -> Traffic:
    """As standard, with r numbers made of the stream (and of k earlier reads) by a step of its own before."""
    if not residual.rank:
        return Traffic(3)
    earlier = sum(min(residual.previous, layer) for layer in range(residual.num_layers)) / residual.num_layers
    return Traffic(3 + 1 + earlier, 2 * residual.rank)


def streams(n: int, logits: int = 0) -> Traffic:
    """mHC's paper, table 2. Coefficients: n in. Input: n in, 1 out. Output to streams: 1 in, n out. Mixing: n in, n
    out. Their sum: 2 n in, n out. Coefficients, n + n + n^2 of them, are written and read once; logits of a mixing
    matrix that is computed from others as well."""
    return Traffic(8 * n + 2, 2 * n**2 + 4 * n + 2 * logits)


def hyper_connections(residual: Any) -> Traffic:
    """Streams; fixed coefficients are parameters, and nothing is read to make them."""
    n = residual.num_streams
    return streams(n) if residual.dynamic else Traffic(streams(n).width - n)


def mhc(residual: Any) -> Traffic:
    """Streams; Sinkhorn's 20 iterations stay in one step on n x n numbers."""
    return streams(residual.num_streams)


def mhc_lite(residual: Any) -> Traffic:
    """Streams, with the n! weights of the permutations written and read beside the matrix."""
    return streams(residual.num_streams, math.factorial(residual.num_streams))


def gated_residual(residual: Any) -> Traffic:
    """r numbers and n gates: n in. Channel gates: n out. Read: n streams, n gates in, 1 out. Write: n + 1 in, n out."""
    n = residual.num_streams
    return Traffic(n + n + (2 * n + 1) + (2 * n + 1), 2 * (residual.rank + n))


def full_attnres(layers: int, group: int) -> Traffic:
    """The paper's S + N, N groups of S layers: N - 1 in and one out in phase 1, S - 1 in and one out in phase 2."""
    return Traffic(group + math.ceil(layers / group))


def block_attnres(num_blocks: int, block_size: float) -> Traffic:
    """The paper's N / S + 5. Phase 1 for S layers: N in; one out a layer. Phase 2: its result, the partial sum and the
    output in, one out."""
    return Traffic(num_blocks / block_size + 5)


def attention_variant(residual: Any, key_share: float = 1.0) -> Traffic:
    """Layer by layer: every source in as a key and as a value, one out; in blocks the partial sum's 3 as well."""
    reads = [residual.num_sources(layer) for layer in range(residual.num_layers + 1)]
    passes = sum((1 + key_share) * m + 1 for m in reads if m > 1)
    return Traffic(passes / residual.num_layers + (0 if residual.num_blocks == residual.num_layers else 3))


def delta_attnres(residual: Any) -> Traffic:
    """Layer by layer: every delta in as a key and as a value, the stream in, one out; the stream's 3, and 3 more for a
    block's partial sum."""
    deltas = [sum(start <= layer for start in residual.block_starts) for layer in range(1, residual.num_layers)]
    passes = sum(2 * n + 2 for n in deltas)
    return Traffic(passes / residual.num_layers + (3 if residual.block_size == 1 else 6))


def denseformer(residual: Any) -> Traffic:
    """The stream's 3; in front of a block the chosen entries of the bank in, their average out."""
    mixed = [layer for layer in residual.mixing_layers() if str(layer) in residual.alpha]
    return Traffic(3 + sum(len(residual.chosen(layer)) + 1 for layer in mixed) / residual.num_layers)


def muddformer(residual: Any) -> Traffic:
    """The stream's 3; in front of a block the latest entry in for h inner numbers and C n weights (written, read), then
    n entries in, C ways out."""
    width = numbers = 0.0
    for layer in residual.mixing_layers():
        (inner, _), (ways, entries) = residual.down[str(layer)].shape, residual.static[str(layer)].shape
        width += 1 + entries + ways
        numbers += 2 * (inner + ways * entries)
    return Traffic(3 + width / residual.num_layers, numbers / residual.num_layers)


def ancre(residual: Any) -> Traffic:
    """All states so far and the output in, one out."""
    return Traffic(sum(layer + 3 for layer in range(residual.num_layers)) / residual.num_layers)


FORMULAS: dict[str, Callable[[Any], Traffic]] = {
    **dict.fromkeys(("prenorm", "rezero", "layerscale", "deepnorm", "keel", "delta"), standard),
    "x0_lambdas": x0_lambdas,
    "highway": highway,
    "siamesenorm": siamesenorm,
    "laurel": laurel,
    "hyper_connections": hyper_connections,
    "mhc": mhc,
    "mhc_lite": mhc_lite,
    "gated_residual": gated_residual,
    "full_attnres": lambda residual: full_attnres(residual.num_layers, residual.group_size),
    "block_attnres": lambda residual: block_attnres(residual.num_blocks, residual.num_layers / residual.num_blocks),
    "multihead_attnres": attention_variant,
    "lowrank_attnres": lambda residual: attention_variant(residual, residual.rank / residual.dim),
    "delta_attnres": delta_attnres,
    "denseformer": denseformer,
    "muddformer": muddformer,
    "ancre": ancre,
}
"""By registered name; each takes the mechanism itself, so that options count."""


def traffic(name: str, residual: Any) -> Traffic:
    """Reads and writes of an average layer of `residual`, registered as `name`."""
    return FORMULAS[name](residual)


def main() -> None:
    from attnres import residual as residuals

    print("The paper's, L=128, N=8, S=16, 4 streams, in units of D (mHC: plus 48 numbers):")
    print(
        f"  standard 3, mHC {streams(4).width}, Full {full_attnres(128, 16).width}, Block {block_attnres(8, 16).width}"
    )
    print("Here, L=24, D=512:")
    for name in residuals.names():
        cost = traffic(name, residuals.build(name, 512, 24))
        print(f"  {name:18} {cost.per_width(512):6.2f}")


if __name__ == "__main__":
    main()
