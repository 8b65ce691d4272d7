"""Several sequences packed into one row: where each begins, so that no layer sees from one into another.

Callers say it by positions that start anew, by the borders that flash attention takes (`cu_seq_lens_q`), or by both.
transformers' masks heed the first alone, and only without a cache and a padding mask; its sdpa and eager functions
never look at the second; and no mask reaches the state of linear attention. So the borders are found here once, for all
layers, and what cannot heed them is refused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from ..errors import UsageError

if TYPE_CHECKING:
    from .configuration import AttnResConfig

STATEFUL = frozenset({"linear_attention", "conv"})
"""Types of layers that carry something from token to token which no mask stops."""


class Packing(NamedTuple):
    """positions: [B, T], counted from the beginning of each sequence, from which transformers makes its masks;
    cu_seqlens: int [N + 1], where the N sequences begin and end if all rows follow one another, for linear attention;
    None where a compiler is not to look."""

    positions: Tensor
    cu_seqlens: Tensor | None


def find_packing(
    config: AttnResConfig,
    shape: tuple[int, int],
    position_ids: Tensor | None,
    cu_seq_lens: Any,
    padding: Any,
    *,
    with_cache: bool,
    has_own_masks: bool,
) -> Packing | None:
    """How the new tokens, of `shape` [B, T], are packed; None if every row is one sequence.

    A sequence begins where position_ids [B or 1, T] do not rise, or at a border of cu_seq_lens [N + 1] (flash
    attention's, for a single row). Padding, zeros in a mask [B, past + T], begins nothing. Where the caller brings
    masks or attention of its own and no layer is linear, the packing is the caller's business and not looked for.
    Raises UsageError for a packing that some layer could not heed.
    """
    rows, tokens = shape
    linear = not STATEFUL.isdisjoint(config.layer_types)
    borders = cu_seq_lens if isinstance(cu_seq_lens, Tensor) else None
    if config._attn_implementation not in ALL_MASK_ATTENTION_FUNCTIONS:
        has_own_masks = True
    if (position_ids is None and borders is None) or (has_own_masks and not linear):
        return None
    if tokens == 1 and (with_cache or not linear):
        return None  # one token starts no second sequence, and looking would make a decoding step wait for the device
    present = None
    if isinstance(padding, Tensor) and padding.dim() == 2:
        present = padding[:, -tokens:].bool()
    if position_ids is None:
        assert borders is not None
        starts = torch.zeros(rows, tokens, dtype=torch.bool, device=borders.device)
    else:
        starts = _restarts(position_ids.expand(rows, -1), present)
    if torch.compiler.is_compiling() and not linear and borders is None:
        # compiled code cannot branch on positions: without cache and padding, masks are made as for packed rows, as
        # transformers makes them
        if not with_cache and present is None:
            return Packing(_positions(starts), None)
        torch._assert_async(~starts.any(), "position_ids start anew: compile with use_cache=False, no attention_mask")
        return None
    if borders is not None:
        starts = _from_borders(borders, starts, position_ids is not None)
    is_packed = bool(starts.any())
    if is_packed:
        _check(config, rows, present, with_cache)
    if linear and not with_cache and borders is None and position_ids is not None:
        _check_beginnings(starts, position_ids.expand(rows, -1), present)
    if not is_packed:
        return None
    begins = starts.clone()
    begins[:, 0] = True
    ends = torch.tensor([rows * tokens], device=starts.device)
    return Packing(_positions(starts), torch.cat([begins.flatten().nonzero().flatten(), ends]))


def _restarts(position_ids: Tensor, present: Tensor | None) -> Tensor:
    """[B, T], true at tokens whose position is not above that of the token before; neither of them padding."""
    falls = position_ids[:, 1:] <= position_ids[:, :-1]
    if present is not None:
        falls = falls & present[:, 1:] & present[:, :-1]
    return torch.nn.functional.pad(falls, (1, 0))


def _from_borders(borders: Tensor, restarts: Tensor, has_positions: bool) -> Tensor:
    rows, tokens = restarts.shape
    places = borders.tolist()
    if rows != 1 or places[:1] != [0] or places[-1] != tokens or places != sorted(places):
        raise UsageError(
            f"cu_seq_lens_q must rise from 0 to the number of tokens of a single row, {tokens}; it is {places}, and "
            f"there are {rows} rows"
        )
    starts = torch.zeros_like(restarts)
    starts[0, [place for place in places if 0 < place < tokens]] = True
    if has_positions and (restarts & ~starts).any():
        raise UsageError(
            "position_ids start anew where cu_seq_lens_q has no border; give one of the two, or make them agree"
        )
    return starts


def _check_beginnings(starts: Tensor, position_ids: Tensor, present: Tensor | None) -> None:
    present = torch.ones_like(starts) if present is None else present
    first = present & (present.cumsum(1) == 1)
    if (position_ids[starts | first] != 0).any():
        raise UsageError(
            "position_ids must start at 0 with every sequence: linear attention goes on from a cache and from nothing "
            "else, and there is none; an engine that keeps keys and values of its own cannot run such layers"
        )


def _check(config: AttnResConfig, rows: int, present: Tensor | None, with_cache: bool) -> None:
    if with_cache:
        raise UsageError(
            "position_ids or cu_seq_lens_q pack several sequences into a row, and a cache has one sequence a row; give "
            "use_cache=False, or a row to each sequence"
        )
    if present is not None and not present.all():
        raise UsageError(
            "attention_mask must be left out where several sequences are packed into a row; let padding be a sequence "
            "of its own, with positions from 0"
        )
    if rows > 1 and "flash" in (config._attn_implementation or ""):
        raise UsageError(
            f"{config._attn_implementation} takes packed sequences in a single row, and there are {rows}; make them "
            "one row, or use attn_implementation='sdpa'"
        )


def _positions(starts: Tensor) -> Tensor:
    place = torch.arange(starts.shape[1], device=starts.device).expand_as(starts)
    return place - torch.where(starts, place, 0).cummax(1).values
