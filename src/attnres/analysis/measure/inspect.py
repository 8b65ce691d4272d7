"""Where the layers of a trained model listen, token by token, and what each source is worth to the loss.

Weights are those of `depth_weights` as the model runs. Influence is measured: sources are left out of reads, as
`leave_out` says, and the change of the loss is what they were worth there. A read with one source alone keeps it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...errors import Failure, UsageError
from ...model.decoder import backbone_of
from ...residual import DepthAttention, State
from ...residual.watch import standing_in
from .leave_out import PARTIAL, Cut, Progress, losses, losses_without
from .mixing import mixing_matrix
from .probe import layer_by_layer


class Read(NamedTuple):
    """What one layer attends over; nothing where it has no read. sources: columns, oldest first, PARTIAL for the
    partial sum; weights [n, T]: their weights on the CPU, the mean over heads where there are several."""

    sources: list[int]
    weights: Tensor


@dataclass
class Inspection:
    """What was measured over T tokens.

    reads: of layer 0 .. L - 1 and of the output; loss [T - 1]: nats for the prediction made at each position;
    sources: those that can be left out; source_change [sources, T - 1]: change of the loss, in nats, without that one
    in every read that has it beside others, NaN where there was no time for it; read_change: per read and source the
    change of the mean loss without it in that read alone, None where there was no time, for a read with one source, and
    altogether where it was not asked for;
    mixing: [L + 1, L + 1], weights of the embedding and of every layer output in what each layer reads.
    """

    reads: list[Read]
    loss: Tensor
    sources: list[int]
    source_change: Tensor
    read_change: list[list[float | None] | None] | None
    mixing: Tensor

    @property
    def measured(self) -> tuple[int, int, int, int]:
        """(sources measured in every read, of how many; sources measured in single reads, of how many)."""
        single = [change for read in self.read_change or [] for change in read or []]
        whole = int((~self.source_change.isnan()).any(1).sum())
        return whole, len(self.sources), sum(change is not None for change in single), len(single)


def inspect(
    model: nn.Module,
    tokens: Tensor,
    *,
    per_read: bool = True,
    minutes: float = math.inf,
    listened: Callable[[Inspection], object] = lambda found: None,
    progress: Progress = lambda *_: None,
) -> Inspection:
    """Looks inside a model while it reads token ids [T], T at least 2.

    Args:
        model: a `Decoder`, or a transformers model with a depth-attention residual connection, native or converted.
        per_read: also leave out every source of every read alone.
        minutes: how long sources may be left out; what is not measured by then stays so.
        listened: called once the weights are known, before sources are left out, with what is known then.
        progress: called with what is measured, how much of it is done, of how much, and the share of the work that it
            was.

    Raises UsageError for a model without depth attention and for fewer than two tokens, Failure for a loss that is not
    finite.
    """
    residual = depth_attention_of(model)
    if tokens.dim() != 1 or len(tokens) < 2:
        raise UsageError(f"tokens must be at least two token ids in one row; they are {list(tokens.shape)}")
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), layer_by_layer(residual):
            reads, loss, states = _listen(model, residual, tokens)
            if not bool(loss.isfinite().all()):
                raise Failure("the loss on this text is not finite; check the model's weights")
            pairs = [Cut(n, l, l) for l, read in enumerate(reads) if len(read.sources) > 1 for n in read.sources]
            first = {cut.source: cut.first for cut in reversed(pairs)}
            sources = sorted(first, key=lambda n: (n == PARTIAL, n))
            cuts = [*(Cut(n, None, first[n]) for n in sources), *(pairs if per_read else [])]
            mixing = _mixing(model, residual, reads, tokens)

            def found(change: Tensor) -> Inspection:
                by_read: list[list[float | None] | None] | None = None
                if per_read:
                    means = iter([None if math.isnan(x) else x for x in change[len(sources) :].mean(1).tolist()])
                    by_read = [[next(means) for _ in r.sources] if len(r.sources) > 1 else None for r in reads]
                return Inspection(reads, loss, sources, change[: len(sources)], by_read, mixing)

            listened(found(torch.full((len(cuts), len(loss)), math.nan)))
            present, deadline = [read.sources for read in reads], time.monotonic() + 60 * minutes
            return found(losses_without(model, residual, tokens, present, states, cuts, progress, deadline) - loss)
    finally:
        model.train(training)


def depth_attention_of(model: nn.Module) -> DepthAttention:
    """The model's residual connection. Raises UsageError if it does not attend over depth."""
    found = next((module for module in model.modules() if isinstance(module, DepthAttention)), None)
    if found is None:
        raise UsageError("model has no depth attention to look at; give one with block_attnres or full_attnres")
    return found


def sources_of(residual: DepthAttention, state: State, layer: int) -> list[int]:
    """The columns of what `layer` attends over in a lean state, PARTIAL for a block's own sum so far."""
    if not residual.reads_depth(layer):
        return []
    names = [name for name in residual.tensor_names(state, layer) if not name.startswith("stream")]
    return [PARTIAL if name.startswith("partial") else int(name.split()[1]) for name in names]


def _listen(model: nn.Module, residual: DepthAttention, tokens: Tensor) -> tuple[list[Read], Tensor, dict[int, State]]:
    """(all reads, the loss at every position but the last, the states in front of every second layer)."""
    seen: dict[int, Read] = {}
    states: dict[int, State] = {}
    read = residual.read

    def look(state: State, layer: int, norm: nn.Module | None = None) -> tuple[Tensor, State]:
        if layer not in seen:  # a parallel block of a converted model reads twice; the first is what its layer sees
            weights = residual.depth_weights(state, layer)[:, 0].float().cpu()
            weights = weights.mean(-1) if weights.dim() > 2 else weights
            seen[layer] = Read(sources_of(residual, state, layer), weights)
            if layer % 2 == 0:
                states[layer] = state
        return read(state, layer, norm)

    with standing_in(residual, read=look):
        loss = losses(model, tokens[None])[0]
    return [seen[layer] for layer in range(residual.num_layers + 1)], loss, states


def _mixing(model: nn.Module, residual: DepthAttention, reads: Sequence[Read], tokens: Tensor) -> Tensor:
    """The mean depth mixing matrix; from the weights where `mixing_matrix` cannot solve for it."""
    if backbone_of(model) is not None and residual.dim > residual.num_layers:
        return mixing_matrix(model, tokens[None])
    size = residual.num_layers + 1
    matrix = torch.zeros(size, size, dtype=torch.float64)
    for layer, read in enumerate(reads):
        if not read.sources:  # the newest read, or everything, and what was added since
            matrix[layer, :layer] = 1.0 if getattr(residual, "reads", None) == "mlp" else matrix[layer - 1, :layer]
            matrix[layer, layer] = 1.0
        for n, weight in zip(
            read.sources, read.weights.double().mean(1) * residual.scale(len(read.sources)), strict=True
        ):
            matrix[layer, members(residual, n, layer)] = weight
    return matrix


def members(residual: DepthAttention, source: int, layer: int) -> list[int]:
    """Which of v_0 .. v_L (0 the embedding, i the output of layer i - 1) the source of the read of `layer` adds up."""
    starts = getattr(residual, "block_starts", None)
    if source == 0 or starts is None:
        return [source]
    if source == PARTIAL:
        return list(range(max(start for start in starts if start <= layer) + 1, layer + 1))
    ends = (*starts[1:], residual.num_layers)
    return list(range(starts[source - 1] + 1, ends[source - 1] + 1))


def entropies(read: Read) -> Tensor:
    """Entropy in nats of a read's weights per token, [T], each divided by their sum; log n for equal weights."""
    weights = read.weights.abs().double()
    share = weights / weights.sum(0).clamp_min(1e-30)
    return -(share * share.clamp_min(1e-30).log()).sum(0)


def focus(reads: Sequence[Read]) -> Tensor:
    """How far from equal a token's weights are, [T]: 0 where all reads listen to all, 1 where each to one source."""
    several = [read for read in reads if len(read.sources) > 1]
    return torch.stack([1 - entropies(read) / math.log(len(read.sources)) for read in several]).mean(0)
