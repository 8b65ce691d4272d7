"""Forms of AttnRes that read depth in front of some layers only, for the experiment of `reads.py`."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from attnres import ops
from attnres.residual import DepthAttention, register
from attnres.residual.base import normed, split_norm
from attnres.residual.mechanisms.block_attnres import block_starts


class SparseState(NamedTuple):
    """blocks: finished blocks, the embedding first; partial: sum of the present block's outputs, None at its start;
    stream: what a layer without a read sees; update: a layer output not yet added to these two. Each [..., D]."""

    blocks: tuple[Tensor, ...]
    partial: Tensor | None
    stream: Tensor
    update: Tensor | None


@register("sparse_reads")
class SparseReads(DepthAttention):
    """Block AttnRes, or Full with as many blocks as layers, that reads before every k-th layer and the output head.

    Args:
        dim: width D.
        num_layers: L; every attention and every MLP is one layer.
        num_blocks: N.
        every: k, layers from one read to the next: 2 is a Transformer block, L / N the borders of blocks.
        offset: the first layer that reads; 1 with every=2 is MLPs alone. Layer 0 sees the embedding anyway.
        others: what layers without a read see: "last_read" and what was added since, or the "sum" of everything.
        eps: of the key norm.
        stream_scale: multiply each read by its number of sources.

    Zero queries are the plain sum at stream_scale. Queries and key norms of layers that do not read are without effect.
    """

    def __init__(
        self,
        dim: int,
        num_layers: int,
        *,
        num_blocks: int,
        every: int,
        offset: int = 0,
        others: str = "last_read",
        eps: float = 1e-6,
        stream_scale: bool = False,
    ) -> None:
        super().__init__(dim, num_layers, eps, stream_scale, "layerwise")
        self.starts = block_starts(num_layers, None, num_blocks)
        self.every, self.offset, self.others = every, offset, others
        self.add_parameters()

    def reads(self, layer: int) -> bool:
        return layer in (0, self.num_layers) or layer % self.every == self.offset

    def start(self, embedding: Tensor) -> SparseState:
        return SparseState((embedding,), None, embedding, None)

    def read(self, state: SparseState, layer: int, norm: nn.Module | None = None) -> tuple[Tensor, SparseState]:
        sources = self.sources(state, layer)
        stream = state.stream
        if not self.reads(layer):
            assert state.update is not None
            fold, rest = split_norm(norm, self.dim)
            stream, x = ops.add_norm(stream, state.update, norm=fold)
            x = normed(x, rest)
        elif len(sources) == 1:
            x = normed(stream, norm)
        else:
            query, key_norm = self.rows(layer)
            scale = self.scale(len(sources))
            h, handed_on = ops.read_norm_chained(query, sources, key_norm, self.eps, scale=scale)
            sources, x = tuple(handed_on), normed(h, norm)
            stream = h if self.others == "last_read" else _plus(stream, state.update)
        closes = layer in self.starts or layer == self.num_layers
        blocks, partial = (sources, None) if closes else (sources[:-1], sources[-1])
        return x, SparseState(blocks, partial, stream, None)

    def write(self, state: SparseState, layer: int, output: Tensor) -> SparseState:
        return state._replace(update=output)

    def finish(self, state: SparseState, norm: nn.Module | None = None) -> Tensor:
        return self.read(state, self.num_layers, norm)[0]

    def latest(self, state: SparseState) -> Tensor:
        return self.sources(state, self.num_layers)[-1]

    def sources(self, state: SparseState, layer: int) -> tuple[Tensor, ...]:
        if state.update is None:
            return state.blocks if state.partial is None else (*state.blocks, state.partial)
        return (*state.blocks, _plus(state.partial, state.update))

    def num_sources(self, layer: int) -> int:
        closed = len(self.starts) + 1 if layer == self.num_layers else sum(start <= layer for start in self.starts)
        return closed + (layer < self.num_layers and layer not in self.starts)

    def read_flops(self, layer: int) -> int:
        return super().read_flops(layer) if self.reads(layer) else 0


def _plus(total: Tensor | None, output: Tensor | None) -> Tensor:
    if total is None or output is None:
        found = output if total is None else total
        assert found is not None
        return found
    return total + output
