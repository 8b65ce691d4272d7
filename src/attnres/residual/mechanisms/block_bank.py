"""What DenseFormer and MUDDFormer share: a bank of what every Transformer block gave, mixed anew for the next block.

    X_0 = embedding,    X_i = block i's stream after its last layer
    Y_i = a mixture of X_0 .. X_i, from which block i + 1 starts (Y_0 = X_0); the output head's norm sees the last Y

Within a block layers add to a plain stream. Layers are counted as everywhere here, so a Transformer block has two.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import NamedTuple

from torch import Tensor, nn

from ..base import check_turn, normed
from ..ragged import RaggedResidual
from .block_attnres import block_starts


class BankState(NamedTuple):
    """bank: X_0 .. X_i, each [..., D]; stream: the present block's, [..., D], None in front of its first layer."""

    bank: tuple[Tensor, ...]
    stream: Tensor | None


class DenseResidual(RaggedResidual):
    """Blocks of `block_size` layers (the last is shorter if need be), connected through the bank."""

    def __init__(self, dim: int, num_layers: int, block_size: int) -> None:
        super().__init__(dim, num_layers)
        self.block_starts = block_starts(num_layers, block_size, None)
        self.block_size = block_size

    @abstractmethod
    def aggregate(self, bank: tuple[Tensor, ...], layer: int) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """(what `layer`, a block's first or num_layers, sees; the stream that its block adds to), [..., D] each; and
        the bank for its next reader."""

    def start(self, embedding: Tensor) -> BankState:
        return BankState((embedding,), None)

    def read(self, state: BankState, layer: int, norm: nn.Module | None = None) -> tuple[Tensor, BankState]:
        if state.stream is not None:
            return normed(state.stream, norm), state
        bank = state.bank
        h, stream, bank = (bank[0], bank[0], bank) if layer == 0 else self.aggregate(bank, layer)
        return normed(h, norm), BankState(bank, stream)

    def write(self, state: BankState, layer: int, output: Tensor) -> BankState:
        check_turn(state.stream is not None, "write", layer)
        assert state.stream is not None
        stream = state.stream + output
        if layer + 1 == self.num_layers or layer + 1 in self.block_starts:
            return BankState((*state.bank, stream), None)
        return BankState(state.bank, stream)

    def latest(self, state: BankState) -> Tensor:
        return state.bank[-1] if state.stream is None else state.stream

    def tensor_names(self, state: BankState, layer: int) -> list[str]:
        names = [f"block {i}" for i in range(len(state.bank))]
        return names if state.stream is None else [*names, f"stream {layer}"]

    def bank_size(self, layer: int) -> int:
        """How many entries the bank has when `layer`, a block's first or num_layers, reads."""
        return len(self.block_starts) + 1 if layer == self.num_layers else self.block_starts.index(layer) + 1

    def mixing_layers(self) -> tuple[int, ...]:
        """The layers that read a mixture of more than the embedding, num_layers for the output read."""
        return (*self.block_starts[1:], self.num_layers)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, block_size={self.block_size}"
