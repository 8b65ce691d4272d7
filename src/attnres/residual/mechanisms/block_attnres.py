"""Block AttnRes: attention over the sums of blocks of layers (paper sections 3 and 4).

The L layers form N blocks of S layers. b_0 is the embedding, b_n the sum of block n's layer outputs. The first layer of
block n attends over [b_0 .. b_{n-1}], a later one also over the block's partial sum. Memory and pipeline traffic are
O(N D) a token instead of O(L D), and about eight blocks keep most of the gain.

Two schedules give the same function. Layer by layer: each read attends over all its sources. Two-phase: pseudo-queries
do not depend on activations, so when a block begins one pass over the finished blocks serves all its layers, and each
layer then merges the one source that is new, the partial sum.

Reads need not stand in front of every layer (`reads`): layers without one see a stream that all add to, as in PreNorm.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ... import ops
from ...errors import UsageError, check_counts
from ..base import check_turn, normed, split_norm, split_scaled
from ..depth_attention import DepthAttention
from ..registry import register


class BlockState(NamedTuple):
    """The value that travels from layer to layer.

    blocks: finished blocks, the embedding first, each [..., D]; partial: sum of the present block's outputs, None at
    its start; update: a layer output not yet added to the sums (two-phase, or where some layers do not read, unless
    lean); outs, lses: phase 1's results for the reads of the present block that are still to come (two-phase only);
    folded: all queries, folded, in a pass without gradients; stream: what the next layer without a read sees, but for
    the update, None where every layer reads or the next one is not such a layer.
    """

    blocks: tuple[Tensor, ...]
    partial: Tensor | None
    update: Tensor | None
    outs: tuple[Tensor, ...]
    lses: tuple[Tensor, ...]
    folded: Tensor | None = None
    stream: Tensor | None = None


@register("block_attnres")
class BlockAttnRes(DepthAttention):
    """Block AttnRes.

    Args:
        dim: width D.
        num_layers: L; every attention and every MLP is one layer.
        block_size: S, layers in a block; the last block is shorter if L % S != 0.
        num_blocks: N, at most L; blocks have L // N layers and the last takes the remainder too. The default is 8, or L
            if that is less. Give one of the two, not both. N = L is Full AttnRes; N = 1 the plain sum with the
            embedding apart.
        eps: of the key norm.
        stream_scale: multiply each read by its number of sources. At zero queries a read is then the plain residual sum
            itself and not its mean, so that the eps of the norm that follows never bites (the decoder's default).
        schedule: "layerwise"; "two_phase" unless the state must stay lean; or "auto": two-phase on CUDA and, without
            gradients or with the native backend, on CPUs, again unless the state must stay lean, else layerwise.
        query: "learned", the pseudo-query w_l; or "input", W_l RMSNorm(v) / D of the newest source v with a D x D
            matrix a layer.
        mixing: "softmax" over the sources; "sigmoid" of each logit alone; or "static", learned scalars without
            queries and keys.
        key_normalised: RMSNorm on the keys; without it a key is the source itself.
        heads: H, slices of the width that attend with weights of their own.
        null_source: add a source of zeros to the softmax, so that a layer may turn away from all others (softmax1).
        temperature: divides the logits.
        reads: what has a read in front of it: "layer", every layer, as published; "transformer_block", every second
            layer (attentions); "block", the first layer of every block; a whole number k, every k-th layer; or "mlp",
            the other half of the layers. Layers without a read see the newest read and what was added since, with "mlp"
            the plain sum of everything. The output head always reads.

    Rows of parameters of layers without a read have no effect. `query` to `temperature` are switches of the paper's
    ablation, as in `FullAttnRes`. Raises UsageError for sizes that are not positive, more blocks than layers, both
    sizes given, switches that exclude each other, or reads that do not divide the blocks.
    """

    def __init__(
        self,
        dim: int,
        num_layers: int,
        *,
        block_size: int | None = None,
        num_blocks: int | None = None,
        eps: float = 1e-6,
        stream_scale: bool = False,
        schedule: str = "auto",
        query: str = "learned",
        mixing: str = "softmax",
        key_normalised: bool = True,
        heads: int = 1,
        null_source: bool = False,
        temperature: float = 1.0,
        reads: int | str = "layer",
    ) -> None:
        switches = dict(query=query, mixing=mixing, key_normalised=key_normalised, heads=heads)
        super().__init__(
            dim, num_layers, eps, stream_scale, schedule, **switches, null_source=null_source, temperature=temperature
        )
        self.block_starts = block_starts(num_layers, block_size, num_blocks)
        ends = (*self.block_starts[1:], num_layers)
        self._block_of = [n for n, end in enumerate(ends) for _ in range(self.block_starts[n], end)]
        self._block_end = dict(zip(self.block_starts, ends, strict=True))
        self.reads = reads
        step = _step(reads, num_layers, self.block_starts)
        first = int(reads == "mlp")
        self._reads_of_block = [range(start + first, end, step) for start, end in self._block_end.items()]
        if reads == "block":
            self._reads_of_block = [range(start, start + 1) for start in self.block_starts]
        self._sparse = step > 1
        self.add_parameters()

    @property
    def num_blocks(self) -> int:
        """N, without the embedding."""
        return len(self.block_starts)

    def reads_depth(self, layer: int) -> bool:
        return layer == self.num_layers or layer in self._reads_of_block[self._block_of[layer]]

    def start(self, embedding: Tensor) -> BlockState:
        stream = None if self.reads_depth(0) else embedding
        return BlockState((embedding,), None, None, (), (), self.folded_queries(embedding), stream)

    def read(self, state: BlockState, layer: int, norm: nn.Module | None = None) -> tuple[Tensor, BlockState]:
        if not self.reads_depth(layer):
            return self._go_along(state, layer, norm)
        if not self._sparse or layer == self.num_layers:
            return self._read(state, layer, norm)
        if self.reads == "mlp":
            assert state.stream is not None
            stream = state.stream if state.update is None else state.stream + state.update
            x, state = self._read(state, layer, norm)
            return x, state._replace(stream=stream)
        h, state = self._read(state, layer, None)  # whole, for the layers up to the next read add to it
        return normed(h, norm), state._replace(stream=h)

    def write(self, state: BlockState, layer: int, output: Tensor) -> BlockState:
        unread = state.partial is not None and self._starts_block(layer)  # the finished block is still a partial sum
        lost = state.stream is None and not self.reads_depth(layer + 1)  # the stream of the read that was left out
        check_turn(state.update is None and not unread and not lost, "write", layer)
        if state.outs or (self._sparse and not self.lean):  # the next read adds it, in the same pass as the merge
            return state._replace(update=output)
        renewed = self.reads_depth(layer + 1) and (self.reads != "mlp" or layer + 1 == self.num_layers)
        stream = None if state.stream is None or renewed else state.stream + output
        return state._replace(partial=_plus(state.partial, output), stream=stream)

    def writes_behind_read(self, layer: int) -> bool:
        return self._sparse or layer in self._block_end

    def latest(self, state: BlockState) -> Tensor:
        return self.sources(state, self.num_layers)[-1]

    def sources(self, state: BlockState, layer: int) -> tuple[Tensor, ...]:
        partial = state.partial if state.update is None else _plus(state.partial, state.update)
        return state.blocks if partial is None else (*state.blocks, partial)

    def tensor_names(self, state: BlockState, layer: int) -> list[str]:
        names = [f"block {n}" for n in range(len(state.blocks))]
        if state.partial is not None:  # in front of a block's first layer it is the finished block before
            names.append(f"block {len(names)}" if self._starts_block(layer) else f"partial {layer}")
        if state.stream is not None:
            names.append(f"stream {layer}")
        return names

    def num_sources(self, layer: int) -> int:
        if layer == self.num_layers:
            return self.num_blocks + 1
        if not self.reads_depth(layer):
            return 0
        return self._block_of[layer] + (1 if self._starts_block(layer) else 2)

    def _starts_block(self, layer: int) -> bool:
        return layer == self.num_layers or layer in self._block_end

    def _go_along(self, state: BlockState, layer: int, norm: nn.Module | None) -> tuple[Tensor, BlockState]:
        """What a layer without a read sees: the stream, with what is still to be added to it."""
        assert state.stream is not None
        stream, partial = state.stream, state.partial
        if state.update is None:
            x = normed(stream, norm)
        else:
            fold, rest = split_norm(norm, self.dim)
            stream, x = ops.add_norm(stream, state.update, norm=fold)
            x, partial = normed(x, rest), _plus(partial, state.update)
        blocks = state.blocks
        if partial is not None and self._starts_block(layer):
            blocks, partial = (*blocks, partial), None
        return x, state._replace(blocks=blocks, partial=partial, update=None, stream=stream)

    def _read(self, state: BlockState, layer: int, norm: nn.Module | None) -> tuple[Tensor, BlockState]:
        """The read of `layer` over its sources; the state behind it is without a stream."""
        if state.outs and not self._starts_block(layer):
            return self._merge(state, layer, norm)
        sources = self.sources(state, layer)
        reads = range(0) if layer == self.num_layers else self._reads_of_block[self._block_of[layer]]
        # with gradients, to read the embedding again costs no more than to merge with it; nor does a block's only read
        worth = len(sources) > 1 or not torch.is_grad_enabled()
        worth = worth and not (self._sparse and len(reads) == 1)
        if layer == next(iter(reads), None) and worth and self.two_phase(sources[0]):
            return self._open_block(state, sources, reads, norm)
        x, sources = self.single_read(sources, layer, norm, state.folded)
        blocks, partial = (sources, None) if self._starts_block(layer) else (sources[:-1], sources[-1])
        return x, BlockState(blocks, partial, None, (), (), state.folded)

    def _open_block(
        self, state: BlockState, sources: tuple[Tensor, ...], reads: range, norm: nn.Module | None
    ) -> tuple[Tensor, BlockState]:
        """Phase 1 for the reads of a block, in front of its first one, which merges where a layer stands before it."""
        layer = reads[0]
        merges = not self._starts_block(layer)
        queries, key_norms = self.queries(state.folded, layer, reads[-1] + 1)
        if reads.step > 1:
            queries = queries[:: reads.step]
            key_norms = None if key_norms is None else key_norms[:: reads.step]
        blocks = state.blocks if merges else sources
        fold, rest = (None, None) if merges else split_norm(norm, self.dim)
        scale = self.scale(len(blocks))
        (x, *outs), lses, handed_on = ops.inter_block_chained(
            queries, blocks, key_norms, self.eps, scale=scale, norm=fold
        )
        if merges:
            opened = state._replace(blocks=tuple(handed_on), outs=(x, *outs), lses=tuple(lses))
            return self._merge(opened, layer, norm)
        after = BlockState(tuple(handed_on), None, None, tuple(outs), tuple(lses[1:]), state.folded)
        return x if fold else normed(x, rest, scale), after

    def _merge(self, state: BlockState, layer: int, norm: nn.Module | None) -> tuple[Tensor, BlockState]:
        update = state.update
        reads = self._reads_of_block[self._block_of[layer]]
        check_turn(update is not None and len(state.outs) == len(reads) - reads.index(layer), "read", layer)
        assert update is not None
        query, key_norm = self.queries(state.folded, layer)
        fold, inside, rest, behind = split_scaled(norm, self.dim, self.scale(len(state.blocks) + 1))
        partial, x = ops.merge_norm(
            query, state.partial, update, key_norm, state.outs[0], state.lses[0], self.eps, scale=inside, norm=fold
        )
        after = BlockState(state.blocks, partial, None, state.outs[1:], state.lses[1:], state.folded)
        return normed(x, rest, behind), after

    def extra_repr(self) -> str:
        reads = f", reads={self.reads!r}" if self._sparse else ""
        return f"{super().extra_repr()}, block_starts={self.block_starts}{reads}"


def block_starts(num_layers: int, block_size: int | None, num_blocks: int | None) -> tuple[int, ...]:
    """First layer of every block, from one of the two sizes."""
    if block_size is not None and num_blocks is not None:
        raise UsageError(f"give block_size or num_blocks, not both; they are {block_size} and {num_blocks}")
    sizes = {"block_size": block_size, "num_blocks": num_blocks}
    check_counts(**{name: size for name, size in sizes.items() if size is not None})
    if block_size is not None:
        return tuple(range(0, num_layers, block_size))
    count = min(8, num_layers) if num_blocks is None else num_blocks
    if count > num_layers:
        raise UsageError(f"num_blocks must be at most the number of layers, {num_layers}; it is {count}")
    size = num_layers // count
    return tuple(range(0, size * count, size))


def _step(reads: int | str, num_layers: int, starts: tuple[int, ...]) -> int:
    """Layers from one read to the next of a block, 1 where every layer reads."""
    steps = {"layer": 1, "transformer_block": 2, "mlp": 2, "block": num_layers}
    step = steps.get(reads, 0) if isinstance(reads, str) else reads
    if not isinstance(step, int) or isinstance(step, bool) or step < 1:
        known = ", ".join(map(repr, steps))
        raise UsageError(f"reads must be one of {known} or a positive whole number of layers; it is {reads!r}")
    if reads == "block":
        if len(starts) == num_layers:
            raise UsageError("reads='block' with blocks of one layer is reads='layer'; take that, or fewer blocks")
        return step
    if step > num_layers or any(start % step for start in starts):
        raise UsageError(
            f"reads={reads!r}, every {step} layers, does not divide the blocks, which start at layers "
            f"{', '.join(map(str, starts))} of {num_layers}; give a block_size that is a multiple of {step}"
        )
    return step


def _plus(partial: Tensor | None, output: Tensor) -> Tensor:
    return output if partial is None else partial + output
