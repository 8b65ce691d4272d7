"""Leaving sources out of a model's reads, many at once, each from where it first makes a difference.

A read goes without one of its sources and the others take its weight over in proportion, so that the weights of the
read (of each head) keep their sum:

    a'_i = a_i * (sum_j a_j) / (sum_{j != s} a_j)        i != s,        a'_s = 0

Nothing before that read changes. States of a residual connection are values, so the one in front of its Transformer
block is taken from a pass that leaves nothing out, and the blocks before are not run again. The rows of one batch leave
out different sources of reads in the same block; what that state holds is one row, which all of them share.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...model.decoder import Decoder, backbone_of
from ...ops import formulas
from ...residual import DepthAttention, State
from ...residual.base import normed
from ...residual.watch import standing_in

TOKENS_AT_ONCE = 4096
"""Tokens of one forward pass over several rows."""
LOGITS_AT_ONCE = 2**27
"""Most logits of such a pass; with a large vocabulary they are most of its memory."""

PARTIAL = -1
"""The source that is a block's own sum so far; the others are the columns 0 (the embedding), 1, 2, ..."""

Progress = Callable[[str, int, int, float], None]


class Cut(NamedTuple):
    """A source that is left out of one layer's read, or of every read that has it beside others (layer None).

    first: the layer of the first read that changes.
    """

    source: int
    layer: int | None
    first: int


def losses_without(
    model: nn.Module,
    residual: DepthAttention,
    tokens: Tensor,
    present: Sequence[Sequence[int]],
    states: dict[int, State],
    cuts: Sequence[Cut],
    progress: Progress,
    deadline: float = math.inf,
) -> Tensor:
    """The losses [cuts, T - 1] on token ids [T] with each cut alone; NaN for cuts that there was no time for.

    present: the sources of every read; states: in front of every Transformer block, by its first layer, with nothing
    left out; deadline: on the clock of time.monotonic. Cuts of every read come first, then those of single reads.
    """
    rows = max(1, min(TOKENS_AT_ONCE, LOGITS_AT_ONCE // _vocabulary(model)) // len(tokens))
    last = residual.num_layers - 2
    starts = [min(cut.first - cut.first % 2, last) for cut in cuts]
    costs = [residual.num_layers - start + _head_in_layers(model, residual) for start in starts]
    results: list[Tensor] = [torch.full((len(tokens) - 1,), math.nan)] * len(cuts)
    done, spent = 0, 0.0
    kinds = [(cut.layer is not None, start) for cut, start in zip(cuts, starts, strict=True)]
    for (_, start), group in groupby(sorted(range(len(cuts)), key=kinds.__getitem__), kinds.__getitem__):
        members = list(group)
        for now in (members[i : i + rows] for i in range(0, len(members), rows)):
            if time.monotonic() > deadline:
                return torch.stack(results)
            with _leaving_out(residual, present, [cuts[i] for i in now]), _starting_at(model, start, states[start]):
                found = losses(model, tokens.expand(len(now), -1))
            for i, row in zip(now, found, strict=True):
                results[i] = row
            done, spent = done + len(now), spent + sum(costs[i] for i in now)
            progress("leaving out sources", done, len(cuts), spent / sum(costs))
    return torch.stack(results)


def losses(model: nn.Module, tokens: Tensor) -> Tensor:
    """Nats for each prediction, [rows, T - 1], of token ids [rows, T], in fp32 (fp64 for fp64) on the CPU."""
    output = model(tokens) if isinstance(model, Decoder) else model(input_ids=tokens, use_cache=False).logits
    logits = output[:, :-1]
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view(len(tokens), -1).cpu()


@contextmanager
def _starting_at(model: nn.Module, layer: int, state: State) -> Iterator[None]:
    """Within, the model runs from `layer`, the first of a Transformer block, and the state in front of it."""
    backbone = backbone_of(model)
    with ExitStack() as changed:
        if backbone is not None:
            run = backbone.run_layers
            changed.enter_context(standing_in(backbone, run_layers=lambda _, __, *rest: run(state, layer, *rest)))
        elif layer:
            from ...hf.convert.surgery import ConvertedLayer, DepthStream  # of the model that is there

            blocks = [module for module in model.modules() if isinstance(module, ConvertedLayer)]
            for block in blocks[: layer // 2]:
                changed.enter_context(standing_in(block, forward=lambda *_, **__: DepthStream(state, layer)))
        yield


@contextmanager
def _leaving_out(residual: DepthAttention, present: Sequence[Sequence[int]], cuts: Sequence[Cut]) -> Iterator[None]:
    """Within, row k of the batch reads without what cuts[k] says. Sources may have one row for all."""

    def read(
        sources: tuple[Tensor, ...], layer: int, norm: nn.Module | None, folded: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        weights = _weights(residual, sources, layer, len(cuts))
        if len(sources) > 1:
            gone = [[n == cut.source and cut.layer in (None, layer) for cut in cuts] for n in present[layer]]
            weights = _without(weights, torch.tensor(gone, device=weights.device))
        return normed(_mix(weights * residual.scale(len(sources)), sources), norm), sources

    with standing_in(residual, single_read=read):
        yield


def _weights(residual: DepthAttention, sources: Sequence[Tensor], layer: int, rows: int) -> Tensor:
    """Weights [sources, rows, T] of a read, [sources, rows, T, heads] with several heads."""
    if not residual.fused:
        return residual.weights_over(layer, tuple(v.expand(rows, -1, -1) for v in sources))
    query, key_norm = residual.rows(layer)
    folded, logits = formulas.fold(query, key_norm, sources[0].dtype), []
    for source in sources:
        v = source.to(folded.dtype)
        square = torch.linalg.vector_norm(v, dim=-1).square() / residual.dim
        logits.append(((v @ folded) * torch.rsqrt(square + residual.eps)).expand(rows, -1))
    return torch.stack(logits).softmax(0)


def _without(weights: Tensor, gone: Tensor) -> Tensor:
    """`weights` with zero where gone [sources, rows], the others of the row sharing in proportion what that leaves."""
    kept = weights.masked_fill(gone.view(*gone.shape, *[1] * (weights.dim() - 2)), 0.0)
    total = kept.sum(0)
    return kept * torch.where(total == 0, 0.0, weights.sum(0) / total)


def _mix(weights: Tensor, sources: Sequence[Tensor]) -> Tensor:
    """sum_i weights[i] * sources[i], [rows, T, D], for the weights of `_weights`."""
    weights = weights if weights.dim() > 3 else weights.unsqueeze(-1)
    values = [source.unflatten(-1, (weights.shape[3], -1)).to(weights.dtype) for source in sources]
    shared = [i for i, value in enumerate(values) if len(value) < weights.shape[1]]
    own = [i for i in range(len(values)) if i not in shared]
    parts = []
    if shared:  # read once for all rows
        parts.append(torch.einsum("nrth,nthd->rthd", weights[shared], torch.stack([values[i][0] for i in shared])))
    if own:
        parts.append(formulas.mix(weights[own], [values[i] for i in own]))
    return sum(parts[1:], parts[0]).flatten(-2).to(sources[0].dtype)


def _vocabulary(model: nn.Module) -> int:
    return getattr(model, "config").vocab_size  # noqa: B009


def _head_in_layers(model: nn.Module, residual: DepthAttention) -> float:
    """What the output head costs, in layers, by their parameters."""
    size = _vocabulary(model)
    tables = sum(p.numel() for p in model.parameters() if p.shape[:1] == (size,))
    layers = sum(p.numel() for p in model.parameters()) - tables
    return size * residual.dim * residual.num_layers / max(1, layers)
