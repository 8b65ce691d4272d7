"""How the work is split over processes, as one dataclass, and every split that cannot work refused with its sums."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from ..errors import UsageError, check_counts
from ..model import DecoderConfig, layer
from ..model.config import MOST

ScheduleName = Literal[
    "GPipe", "1F1B", "Interleaved1F1B", "LoopedBFS", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV"
]

ONE_STAGE = ("GPipe", "1F1B")
V_SHAPED = ("ZBVZeroBubble", "DualPipeV")
SPLIT_BACKWARD = ("InterleavedZeroBubble", *V_SHAPED)  # the weights' gradients are a second pass, later
IN_ROUNDS = ("Interleaved1F1B", "InterleavedZeroBubble")


@dataclass(frozen=True)
class ParallelConfig:
    """How a run is split over processes. Raises UsageError for a value outside its range."""

    dp: int = 1
    """Replicas of the model; each trains on its own part of the batch."""
    shard: int = 1
    """Processes that share one replica's parameters, gradients and optimizer state (FSDP2); each trains on its own part
    of the batch."""
    ep: int = 1
    """Processes, of the dp x shard that train on parts of the batch, that share the experts of every layer (expert
    parallelism)."""
    tp: int = 1
    """Processes that split every matrix, and between layers the tokens of every sequence (tensor parallelism)."""
    pp: int = 1
    """Processes in a row that hold successive layers (pipeline parallelism)."""
    virtual_stages: int = 1
    """Pieces of the model in one process of the pipeline."""
    schedule: ScheduleName = "1F1B"
    """Order of the pipeline's forward and backward passes."""
    microbatches: int | None = None
    """Parts that go through the pipeline one after the other; the default is 2 pp, and 1 without a pipeline."""
    pipeline_cache: Literal["on", "off"] = "on"
    """Send a process only the blocks that it does not hold yet; off: the whole history at every hop."""
    timeout: int = 300
    """Seconds that a process waits for the others; after that a job of which one process has died ends."""

    def __post_init__(self) -> None:
        for name in ("dp", "shard", "ep", "tp", "pp", "virtual_stages", "timeout"):
            _positive(name, getattr(self, name))
        if self.schedule not in get_args(ScheduleName):
            known = ", ".join(get_args(ScheduleName))
            raise UsageError(f"parallel.schedule must be one of {known}; it is {self.schedule!r}")
        if self.pipeline_cache not in ("on", "off"):
            raise UsageError(f"parallel.pipeline_cache must be on or off; it is {self.pipeline_cache!r}")
        if self.microbatches is not None:
            _positive("microbatches", self.microbatches)

    @property
    def world_size(self) -> int:
        """Processes of the whole job."""
        return self.dp * self.shard * self.tp * self.pp

    @property
    def expert_replicas(self) -> tuple[int, int]:
        """dp and shard as the experts have them: copies of each, and processes that share its parameters (FSDP2)."""
        if self.shard % self.ep:
            return self.dp * self.shard // self.ep, 1
        return self.dp, self.shard // self.ep

    @property
    def microbatch_count(self) -> int:
        """Micro-batches of a batch, the default resolved."""
        if self.microbatches is not None:
            return self.microbatches
        return 2 * self.pp if self.pp > 1 else 1

    @property
    def chunks(self) -> int:
        """Pieces into which the pipeline cuts the layers."""
        return self.pp * self.virtual_stages

    def check(
        self, world_size: int, model: DecoderConfig, batch_size: int, context: int, checkpointing: bool = False
    ) -> None:
        """Raises UsageError, with the sums, unless this split works.

        world_size: processes that were started; batch_size: sequences in one forward pass of the whole job; context:
        tokens in a sequence; checkpointing: whether activations are recomputed in the backward pass.
        """
        if self.world_size != world_size:
            raise UsageError(
                f"parallel.dp x shard x tp x pp must be the number of processes: {self.dp} x {self.shard} x {self.tp} "
                f"x {self.pp} = {self.world_size}, and there are {world_size}; change one of them, or start "
                f"{self.world_size} processes"
            )
        self._check_batch(batch_size)
        self._check_experts(model)
        self._check_tensor(model, context)
        self._check_pipeline(model, checkpointing)

    def _check_batch(self, batch_size: int) -> None:
        ranks = self.dp * self.shard
        if batch_size % ranks:
            raise UsageError(
                f"batch_size must be a multiple of parallel.dp x shard: {batch_size} sequences over {self.dp} x "
                f"{self.shard} = {ranks} leave {batch_size % ranks} over"
            )
        if batch_size // ranks % self.microbatch_count:
            raise UsageError(
                f"parallel.microbatches must divide the sequences of one replica: {batch_size} / ({self.dp} x "
                f"{self.shard}) = {batch_size // ranks} sequences over {self.microbatch_count} micro-batches leave "
                f"{batch_size // ranks % self.microbatch_count} over; change batch_size or microbatches"
            )

    def _check_experts(self, model: DecoderConfig) -> None:
        ranks = self.dp * self.shard
        if ranks % self.ep:
            raise UsageError(
                f"parallel.ep must divide parallel.dp x shard: {self.dp} x {self.shard} = {ranks} processes in groups "
                f"of {self.ep} leave {ranks % self.ep} over"
            )
        if self.ep > 1 and not any(model.has_experts(i) for i in range(model.num_hidden_layers)):
            raise UsageError(
                f"parallel.ep {self.ep} is for a mixture of experts, and the model has none; leave it out, or set "
                "model.num_experts"
            )
        if model.num_experts % self.ep:
            raise UsageError(
                f"num_experts must be a multiple of parallel.ep: {model.num_experts} over {self.ep} leaves "
                f"{model.num_experts % self.ep} over"
            )

    def _check_tensor(self, model: DecoderConfig, context: int) -> None:
        kinds = set(model.layer_kinds)
        if self.tp > 1 and (whole := [kind.__name__ for kind in kinds if not kind.split]):
            raise UsageError(f"parallel.tp must be 1 for {whole[0]} layers, which do not say how they are split")
        names = [name for kind in layer.kinds() if kind in kinds for name in kind.divides]
        counts = {"context": context, **{name: getattr(model, name) for name in names}}
        for name, count in counts.items():
            if count % self.tp:
                raise UsageError(
                    f"{name} must be a multiple of parallel.tp: {count} over {self.tp} leaves {count % self.tp} over"
                )

    def _check_pipeline(self, model: DecoderConfig, checkpointing: bool) -> None:
        pp, stages, count = self.pp, self.virtual_stages, self.microbatch_count
        if pp == 1:
            if stages > 1 or count > 1:
                name = "virtual_stages" if stages > 1 else "microbatches"
                raise UsageError(
                    f"parallel.{name} is for a pipeline, and parallel.pp is 1; leave it out, or set parallel.pp"
                )
            return
        if self.chunks > model.num_layers:
            raise UsageError(
                f"parallel.pp x virtual_stages must be at most the layers, two a Transformer block: {pp} x {stages} = "
                f"{self.chunks} pieces, and {model.num_hidden_layers} x 2 = {model.num_layers} layers"
            )
        if self.schedule in ONE_STAGE and stages != 1:
            raise UsageError(
                f"parallel.schedule {self.schedule} has one stage in a process, and virtual_stages is {stages}; use "
                "Interleaved1F1B or LoopedBFS for more"
            )
        if self.schedule in V_SHAPED and stages != 2:
            raise UsageError(
                f"parallel.schedule {self.schedule} has two stages in every process; set virtual_stages to 2, not "
                f"{stages}"
            )
        if self.schedule in SPLIT_BACKWARD:
            if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13):
                raise UsageError(
                    f"parallel.schedule {self.schedule} splits the backward pass, which is tested on torch 2.13 and "
                    f"newer only; this is {torch.__version__}: use Interleaved1F1B"
                )
            if checkpointing:
                raise UsageError(
                    f"parallel.schedule {self.schedule} splits the backward pass, so that checkpointing would compute "
                    "every Transformer block more than twice; leave out checkpointing, or use Interleaved1F1B"
                )
        self._check_microbatches(count)

    def _check_microbatches(self, count: int) -> None:
        least = {"1F1B": self.pp, "DualPipeV": self.chunks}.get(self.schedule, 1)
        if count < least:
            raise UsageError(
                f"parallel.schedule {self.schedule} needs as many micro-batches as the pipeline has stages: "
                f"parallel.microbatches is {count}, and there are {least} stages"
            )
        rounds = max(1, count // self.pp)
        if self.schedule in IN_ROUNDS and count % rounds:
            raise UsageError(
                f"parallel.schedule {self.schedule} runs in rounds of equal length: {count} micro-batches in {count} "
                f"// {self.pp} = {rounds} rounds leave {count % rounds} over; make microbatches a multiple of pp"
            )


def _positive(name: str, value: int) -> None:
    check_counts(**{f"parallel.{name}": value})
    if value > MOST:
        raise UsageError(f"parallel.{name} must be at most {MOST}; it is {value}")
