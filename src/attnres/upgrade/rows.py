"""Sequences of tokens to rows of equal length, packed where the models keep sequences apart, and their order."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from .. import files
from ..errors import Failure

IGNORED = -100
"""The label of a token that is not scored, as transformers' losses have it."""


class Tokens(NamedTuple):
    """A sequence: ids, and which of them the loss is on, both [N]. The first has nothing before it to be predicted
    from, so it is never scored."""

    ids: np.ndarray
    scored: np.ndarray


class Rows(Dataset):
    """Rows of a model's inputs: ids, positions and whether a token is scored, each [rows, context].

    Positions start at 0 with every sequence. What a row has left over is a sequence of its own, of which nothing is
    scored. packed: whether rows hold several sequences; without, models are not told of positions.
    """

    def __init__(self, ids: np.ndarray, positions: np.ndarray, scored: np.ndarray, packed: bool) -> None:
        self.ids, self.positions, self.scored, self.packed = ids, positions, scored, packed

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        ids = torch.from_numpy(self.ids[row].astype(np.int64))
        scored = torch.from_numpy(np.array(self.scored[row]))
        inputs = {"input_ids": ids, "labels": torch.where(scored, ids, IGNORED)}
        if self.packed:
            inputs["position_ids"] = torch.from_numpy(self.positions[row].astype(np.int64))
        return inputs

    def taken(self, rows: Sequence[int] | np.ndarray) -> Rows:
        """These of the rows, in this order, copies in memory."""
        return Rows(self.ids[rows], self.positions[rows], self.scored[rows], self.packed)

    def spread(self, count: int) -> Rows:
        """At most so many of the rows, evenly spread."""
        count = min(count, len(self))
        return self.taken([i * len(self) // count for i in range(count)])

    @property
    def targets(self) -> int:
        """Scored tokens."""
        return int(self.scored.sum())


def pack(sequences: Iterable[Tokens], context: int, padding: int, packed: bool) -> Rows:
    """Rows of `context` tokens out of sequences of at most as many, each whole in one row.

    The longest sequences come first, each goes where it leaves the least room; without `packed` each has its own row.
    """
    placed: list[list[Tokens]] = []
    with_room: dict[int, list[int]] = {}  # by the tokens that are left in a row
    for sequence in sorted(sequences, key=lambda s: -len(s.ids)):
        length = len(sequence.ids)
        room = next((r for r in range(length, context) if with_room.get(r)), None) if packed else None
        if room is None:
            row, room = len(placed), context
            placed.append([])
        else:
            row = with_room[room].pop()
        placed[row].append(sequence)
        with_room.setdefault(room - length, []).append(row)
    ids = np.full((len(placed), context), padding, np.int32)
    positions = np.zeros((len(placed), context), np.int32)
    scored = np.zeros((len(placed), context), np.bool_)
    for row, members in enumerate(placed):
        at = 0
        for member in members:
            end = at + len(member.ids)
            ids[row, at:end], scored[row, at:end] = member.ids, member.scored
            scored[row, at] = False
            positions[row, at:end] = np.arange(end - at)
            at = end
        positions[row, at:] = np.arange(context - at)
    return Rows(ids, positions, scored, packed)


def save(rows: Rows, folder: Path) -> None:
    """Writes rows as files that `opened` maps. Raises Failure if they cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("ids", "positions", "scored"):
            files.write_whole(folder / f"{name}.npy", partial(np.save, arr=getattr(rows, name)))
    except OSError as error:
        raise Failure(f"cannot write {folder}: {error.strerror}; free some space and call again") from error


def opened(folder: Path, packed: bool) -> Rows:
    """The rows that `save` wrote."""
    ids, positions, scored = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("ids", "positions", "scored"))
    return Rows(ids, positions, scored, packed)


def order(rows: int, count: int, seed: int) -> np.ndarray:
    """Which of `rows` rows a training sees, `count` in all: all of them in random order, then all in another one."""
    # as in data/batches.py: RandomState promises one stream in all versions of NumPy
    epochs = (
        np.random.RandomState(np.random.MT19937(np.random.SeedSequence([seed, epoch]))).permutation(rows)
        for epoch in range(-(-count // rows))
    )
    return np.concatenate(list(epochs))[:count]
