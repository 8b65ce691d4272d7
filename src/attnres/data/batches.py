"""Tokens to batches: shuffled and endless for training, fixed for validation.

Design choice: batch k is a pure function of (seed, k, tokens). Resuming needs the step and nothing else.
"""

from __future__ import annotations

import itertools
import mmap
from collections.abc import Iterator
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from ..errors import UsageError


class Batches(Dataset):
    """Endless shuffled batches for next-token prediction, from `start_step` on: (inputs, targets), each int64 [B, T].

    An epoch cuts the tokens into windows of context + 1 tokens that do not overlap, beginning at a random place in the
    tokens that the windows leave over, and visits them in random order; both are drawn anew for each epoch from
    (seed, epoch). Rows run on from epoch to epoch, so none is dropped and a batch may span two epochs.

    A step takes batch_size * world_size rows, of which `rank` gets its batch_size in order: the rows of a step depend
    on the product only. `batches[k]` is the batch of step k, a pure function of (seed, k, tokens), whatever
    `start_step` and `num_workers` are. pin_memory: in pages that a GPU copies from beside the work; that starts CUDA in
    this process. Raises UsageError for arguments out of range and for too few tokens.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        batch_size: int,
        context: int,
        seed: int,
        *,
        start_step: int = 0,
        num_workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
        pin_memory: bool = False,
    ) -> None:
        _require_at_least(1, batch_size=batch_size, context=context, world_size=world_size)
        _require_at_least(0, seed=seed, start_step=start_step, num_workers=num_workers, rank=rank)
        if rank >= world_size:
            raise UsageError(f"rank must be below world_size = {world_size}, but is {rank}")
        _require_window(tokens, context)
        self.tokens, self.batch_size, self.context, self.seed = tokens, batch_size, context, seed
        self.start_step, self.num_workers, self.rank, self.world_size = start_step, num_workers, rank, world_size
        self.pin_memory = pin_memory

    def __getitem__(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        window = self.context + 1
        # Every epoch has as many windows, wherever they begin, so that a row's epoch is plain arithmetic.
        windows = max(1, (len(self.tokens) - self.context) // window)
        left_over = len(self.tokens) - windows * window
        first_row = (step * self.world_size + self.rank) * self.batch_size
        rows = []
        for row in range(first_row, first_row + self.batch_size):
            epoch, position = divmod(row, windows)
            begin, order = _shuffle(self.seed, epoch, windows, left_over)
            start = begin + int(order[position]) * window
            rows.append(self.tokens[start : start + window])
        return _inputs_and_targets(rows)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        loader = DataLoader(
            self,
            batch_size=None,
            sampler=itertools.count(self.start_step),
            num_workers=self.num_workers,
            # Without a generator of its own the loader would draw from the global one, which dropout may be using.
            generator=torch.Generator(),
            pin_memory=self.pin_memory,
        )
        return iter(loader)

    def __getstate__(self) -> dict[str, Any]:
        # Workers that are not forked get the mapped file by name: a pickled memmap is a copy of the corpus.
        state, tokens = dict(self.__dict__), self.tokens
        if isinstance(tokens, np.memmap) and isinstance(tokens.base, mmap.mmap):
            state["tokens"] = partial(np.memmap, tokens.filename, tokens.dtype, "r", tokens.offset, tokens.shape)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        tokens = state["tokens"]
        self.__dict__.update(state, tokens=tokens() if callable(tokens) else tokens)


def validation_batches(
    tokens: np.ndarray, batch_size: int, context: int, max_tokens: int | None = None
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches (inputs, targets), each int64 [<= B, T]: the same tokens in the same order at each call.

    At most `max_tokens` targets (None: all) in whole windows spread evenly over `tokens`. Neighbouring windows share a
    token, so that no target is lost between them. The last batch may have fewer rows: weigh losses by targets.numel().
    Raises UsageError for arguments out of range and for too few tokens.
    """
    _require_at_least(1, batch_size=batch_size, context=context)
    _require_window(tokens, context)
    windows = count = (len(tokens) - 1) // context
    if max_tokens is not None:
        _require_at_least(context, max_tokens=max_tokens)
        count = min(windows, max_tokens // context)
    starts = [index * windows // count * context for index in range(count)]
    batches = (starts[row : row + batch_size] for row in range(0, count, batch_size))
    return (_inputs_and_targets([tokens[start : start + context + 1] for start in batch]) for batch in batches)


@lru_cache(maxsize=2)
def _shuffle(seed: int, epoch: int, windows: int, left_over: int) -> tuple[int, np.ndarray]:
    # RandomState, unlike Generator, promises one stream in all versions of NumPy (NEP 19): upgrades keep a run exact.
    random = np.random.RandomState(np.random.MT19937(np.random.SeedSequence([seed, epoch])))
    return int(random.randint(left_over + 1, dtype=np.int64)), random.permutation(windows)


def _inputs_and_targets(rows: list[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    block = torch.from_numpy(np.stack(rows).astype(np.int64))
    return block[:, :-1].contiguous(), block[:, 1:].contiguous()


def _require_at_least(minimum: int, **arguments: int) -> None:
    for name, value in arguments.items():
        if value < minimum:
            raise UsageError(f"{name} must be at least {minimum}, but is {value}")


def _require_window(tokens: np.ndarray, context: int) -> None:
    if len(tokens) <= context:
        raise UsageError(
            f"the corpus has {len(tokens)} tokens on this side of the split, fewer than context + 1 = {context + 1}; "
            "give a larger corpus, a smaller context or another validation_fraction"
        )
