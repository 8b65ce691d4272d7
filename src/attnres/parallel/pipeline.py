"""The pipeline of one rank: its chunks of the decoder, the stages around them, and torch's schedule over those."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining import schedules
from torch.distributed.tensor import DTensor

from ..model import DecoderConfig
from . import routing
from .config import ONE_STAGE, V_SHAPED, ParallelConfig
from .part import Border, ModelPart, borders
from .stage import CachingStage, Store

TOKENS, LOGITS = "tokens", "logits"


class Layout:
    """Where every chunk's layers begin and on which rank it runs, what its hops carry, and the shapes of that.

    Args:
        shape: [b, T, D] of the residual stream of one micro-batch on one process; dtype: of the stream.
        cuts: the first layer of every chunk, and num_layers; the default is even pieces.
    """

    def __init__(
        self,
        config: DecoderConfig,
        parallel: ParallelConfig,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        cuts: Sequence[int] | None = None,
    ) -> None:
        self.cuts = list(cuts or routing.cut(config.num_layers, parallel.chunks))
        folded = parallel.schedule in V_SHAPED
        self.ranks = routing.folded(parallel.pp) if folded else routing.looped(parallel.pp, parallel.chunks)
        self.borders = borders(config, self.cuts[1:-1], shape, dtype)
        names: list[Sequence[str]] = [(), *(border.names for border in self.borders)]
        self.routes = routing.routes(names, self.ranks, parallel.pipeline_cache == "on")
        self.like = {n: like for border in self.borders for n, like in zip(border.names, border.like, strict=True)}

    def before(self, chunk: int) -> Border | None:
        return self.borders[chunk - 1] if chunk else None

    def after(self, chunk: int) -> Border | None:
        return self.borders[chunk] if chunk < len(self.borders) else None

    def on_rank(self, rank: int) -> list[int]:
        """The chunks of a rank, in order."""
        return [chunk for chunk, owner in enumerate(self.ranks) if owner == rank]

    def hop_bytes(self) -> list[int]:
        """Bytes that each hop carries forward for one micro-batch, and backward as many; 0 within a rank."""
        return [
            0 if self.ranks[c] == self.ranks[c + 1] else sum(self.like[name].nbytes for name in self.routes[c].sent)
            for c in range(len(self.ranks) - 1)
        ]


def chunks(config: DecoderConfig, layout: Layout, rank: int, context: int) -> list[ModelPart]:
    """The chunks of a rank on the meta device: without memory for their parameters yet. context: tokens T."""
    with torch.device("meta"):
        return [
            ModelPart(config, layout.cuts[c], layout.cuts[c + 1], context, layout.before(c), layout.after(c))
            for c in layout.on_rank(rank)
        ]


class Pipeline:
    """Runs batches through the chunks of all ranks.

    Args:
        parts: this rank's chunks, on their device and sharded as they are to be.
        rows: sequences in one batch of this replica; context: tokens T in each.
        loss: (logits [b, T, V], targets [b, T]) -> scalar; the gradients are those of the sum over micro-batches.
    """

    def __init__(
        self,
        parts: Sequence[ModelPart],
        layout: Layout,
        parallel: ParallelConfig,
        mesh: DeviceMesh,
        device: torch.device,
        rows: int,
        context: int,
        loss: Callable[[Tensor, Tensor], Tensor],
    ) -> None:
        self.parts, self.layout, self.rows = parts, layout, rows
        self.group = mesh["pp"].get_group()
        self.rank, self.first_rank, self.last_rank = mesh["pp"].get_local_rank(), layout.ranks[0], layout.ranks[-1]
        self.store = Store()
        with torch.device("meta"):
            tokens = torch.empty(rows // parallel.microbatch_count, context, dtype=torch.int64)
            logits = torch.empty(*tokens.shape, parts[0].config.vocab_size, dtype=_dtype(layout))
        like = {**layout.like, TOKENS: tokens, LOGITS: logits}
        self.stages = [
            CachingStage(
                part,
                index,
                len(layout.ranks),
                device,
                self.group,
                route=layout.routes[index],
                store=self.store,
                like=like,
                sends_itself=parallel.schedule not in ONE_STAGE,
            )
            for part, index in zip(parts, layout.on_rank(self.rank), strict=True)
        ]
        schedule = schedules.get_schedule_class(parallel.schedule)
        stages: Any = self.stages[0] if parallel.schedule in ONE_STAGE else self.stages
        self.schedule = schedule(stages, parallel.microbatch_count, loss_fn=loss, scale_grads=False)

    def train(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Adds the gradients of a batch, token ids [rows, T], to the parameters; returns the loss, 0 on other ranks."""
        return self._run(self.schedule.step, inputs, targets)

    def evaluate(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """The loss of a batch, token ids [rows, T]; 0 on other ranks than the last chunk's."""
        with torch.no_grad():
            return self._run(self.schedule.eval, inputs, targets)

    @property
    def copies(self) -> list[Tensor]:
        """The weight of a tied output head: the same parameter as the embedding, which another chunk holds."""
        last = self.parts[-1]
        return [last.lm_head.weight] if last.is_last and not last.is_first and last.config.tie_word_embeddings else []

    def sum_tied_gradients(self) -> None:
        """Adds up the gradients of a tied embedding and output head, so that both copies take the same steps."""
        if not self.parts[0].config.tie_word_embeddings:
            return
        own = [part.embed_tokens.weight for part in self.parts if part.is_first] + self.copies
        gradients = [local(weight.grad) for weight in own if weight.grad is not None]
        if self.first_rank == self.last_rank and self.rank == self.first_rank:
            total = gradients[0] + gradients[1]
        elif self.rank in (self.first_rank, self.last_rank):
            other = self.last_rank if self.rank == self.first_rank else self.first_rank
            total = gradients[0] + self._exchanged(gradients[0], other)
        else:
            return
        for gradient in gradients:
            gradient.copy_(total)

    def _exchanged(self, tensor: Tensor, rank: int) -> Tensor:
        """The tensor that another rank of the pipeline gives for this one."""
        received = torch.empty_like(tensor)
        peer = distributed.get_global_rank(self.group, rank)
        ops = [distributed.P2POp(distributed.isend, tensor, peer, self.group)]
        ops.append(distributed.P2POp(distributed.irecv, received, peer, self.group))
        for work in distributed.batch_isend_irecv(ops):
            work.wait()
        return received

    def sent_bytes(self) -> dict[int, Counter[str]]:
        """Bytes sent since the last call by each of this rank's chunks, "forward" and "backward"."""
        sent = {stage.stage_index: Counter(stage.sent_bytes) for stage in self.stages}
        for stage in self.stages:
            stage.sent_bytes.clear()
        return sent

    def _run(self, run: Callable[..., Any], inputs: Tensor, targets: Tensor) -> Tensor:
        tokens = (inputs,) if self.rank == self.first_rank else ()
        losses: list[Tensor] = []
        ends = {"target": targets, "losses": losses} if self.rank == self.last_rank else {}
        run(*tokens, **ends, return_outputs=False)
        for stage in self.stages:
            stage.finish_sends()
        return (
            torch.stack([loss.detach() for loss in losses]).sum()
            if losses
            else inputs.new_zeros((), dtype=torch.float32)
        )


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _dtype(layout: Layout) -> torch.dtype:
    return next(iter(layout.like.values())).dtype
