"""One process's share of a training step: its parts of the model, its rows of every batch, and what joins them up.

What a step computes does not depend on the split: a batch has the same rows, the weights start from the same values,
and loss, gradients and their norm are those of one process up to rounding. A process alone has all of it: its part is
the whole decoder, there are no process groups, and nothing is sent.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional as F

from ..model import Decoder, DecoderConfig
from ..model.decoder import Backbone
from . import experts, fsdp, gradients, mesh, tensor
from .agreement import summed
from .config import ParallelConfig

if TYPE_CHECKING:
    from .pipeline import Pipeline

IGNORED = -100
"""The target of a token that does not count."""


class Share:
    """What this process has of a model in training.

    Args:
        batch_size: sequences in a batch of the whole job; context: tokens T in each; accumulate: batches in a step.
        precision: bfloat16 for autocast to it.
        compile: compile the forward pass and the loss, in a process alone.

    parts: its parts of the model, in the order of their layers. replica: which of `replicas`, each of which takes
    `rows` of every batch.
    """

    def __init__(
        self,
        config: DecoderConfig,
        parallel: ParallelConfig,
        device: torch.device,
        *,
        batch_size: int,
        context: int,
        accumulate: int,
        seed: int,
        precision: torch.dtype,
        checkpointing: bool = False,
        compile: bool = False,
    ) -> None:
        self.parallel, self.device, self.precision = parallel, device, precision
        self.context, self.accumulate = context, accumulate
        self.replicas, self.replica = parallel.dp * parallel.shard, 0
        self.rows = batch_size // self.replicas
        self.pipeline: Pipeline | None = None
        self.mesh: DeviceMesh | None = None
        self.expert_mesh: DeviceMesh | None = None
        self.parts: Sequence[Backbone]
        self._loss = torch.compile(self._batch_loss) if compile else self._batch_loss
        self._sent: Counter[str] = Counter()
        self._sent_tokens = 0
        if parallel.world_size == 1:
            self.parts = [Decoder(config, seed).to(device)]
            self.parts[0].enable_checkpointing(checkpointing)
            return
        # torch's pipelines bring its compiler along, for which a process alone would wait
        from .build import build_parts
        from .pipeline import Layout, Pipeline

        self.mesh = mesh.build(parallel, device)
        self.expert_mesh = mesh.of_experts(parallel, self.mesh)
        self.replica = self.mesh.get_local_rank("dp") * parallel.shard + self.mesh.get_local_rank("shard")
        stream = (self.rows // parallel.microbatch_count, context // parallel.tp, config.hidden_size)
        layout = Layout(config, parallel, stream, precision)
        parts = build_parts(
            config, layout, self.mesh, device, context, seed, checkpointing, expert_mesh=self.expert_mesh
        )
        for part in parts:
            part.precision = precision
        self.parts = parts
        if parallel.pp > 1:
            self.pipeline = Pipeline(parts, layout, parallel, self.mesh, device, self.rows, context, self._mean_loss)

    @property
    def is_whole(self) -> bool:
        """Whether there is no other process."""
        return self.mesh is None

    def backward(self, inputs: Tensor, targets: Tensor, is_last: bool) -> float:
        """Adds the gradients of a batch, token ids [rows, T].

        Returns this process's part of the loss (`mean`), divided by the batches of the step, of which this may be the
        last; 0 before a pipeline's end.
        """
        if self.pipeline is not None:
            return self.pipeline.train(inputs, targets).item()
        (part,) = self.parts
        if isinstance(part, FSDPModule):
            part.set_requires_gradient_sync(is_last)
        loss = self._loss(inputs, targets)
        loss.backward()
        return loss.item()

    def join_gradients(self) -> None:
        """After the last batch of a step: every gradient becomes that of the whole job."""
        if self.mesh is None:
            return
        for part in self.parts:
            experts.average_gradients(part, self.parallel.ep)
            if self.parallel.tp > 1:
                tensor.reduce_replicated_gradients(part, self.mesh["tp"])
        if self.pipeline is not None:
            self.pipeline.sum_tied_gradients()
            for sent in self.pipeline.sent_bytes().values():
                self._sent.update(sent)
            self._sent_tokens += self.rows * self.context * self.accumulate

    def clip(self, parameters: Iterable[nn.Parameter], max_norm: float | None) -> Tensor:
        """Of many processes: scales the gradients down to the global norm `max_norm`; returns their norm before."""
        assert self.mesh is not None
        copies = [] if self.pipeline is None else self.pipeline.copies
        return gradients.clip(parameters, max_norm, self.mesh, copies, self.expert_mesh)

    def mean(self, loss: float) -> float:
        """The job's loss from those of all processes."""
        return summed(loss, self.device) / (self.replicas * self.parallel.tp)

    @torch.no_grad()
    def evaluate(self, inputs: Tensor, targets: Tensor) -> float:
        """This process's part (`mean`) of the summed loss of a batch of at most batch_size rows."""
        inputs = self._own_rows(inputs, 0).to(self.device)
        targets = self._own_rows(targets, IGNORED).to(self.device)
        loss = self._loss(inputs, targets) if self.pipeline is None else self.pipeline.evaluate(inputs, targets)
        return loss.item() * self.rows * self.replicas * self.context * self.accumulate

    def end_evaluation(self) -> None:
        """Gives back what evaluating has gathered."""
        for part in self.parts:
            fsdp.reshard(part)

    def groups(self, *names: str) -> list[distributed.ProcessGroup]:
        """The process groups along dimensions of the mesh; none for a process alone."""
        return [] if self.mesh is None else [self.mesh.get_group(name) for name in names]

    def traffic(self) -> dict[str, float]:
        """Bytes sent per token and hop of the pipeline since the last call; nothing without one."""
        if self.pipeline is None:
            return {}
        tokens = self._sent_tokens * self.replicas * (self.parallel.chunks - 1)
        totals = {way: summed(float(self._sent[way]), self.device) for way in ("forward", "backward")}
        self._sent.clear()
        self._sent_tokens = 0
        return {f"{way}_bytes_per_token_and_hop": total / tokens for way, total in totals.items()}

    def _batch_loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == torch.bfloat16):
            logits = self.parts[0](inputs)
        return self._mean_loss(logits, targets)

    def _mean_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Over the tokens of this replica's rows, of which the micro-batch is a part, and the batches of a step."""
        tokens = self.rows * self.context * self.accumulate
        total = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="sum")
        return total / tokens

    def _own_rows(self, tokens: Tensor, filler: int) -> Tensor:
        """This replica's rows of a batch; where that has fewer than all replicas take, they are filled up."""
        if self.mesh is None:
            return tokens
        own = tokens[self.replica * self.rows :][: self.rows]
        return torch.cat([own, tokens.new_full((self.rows - len(own), tokens.shape[1]), filler)])
