"""transformers' tensor parallelism with the residual stream split along the sequence.

transformers splits the matrices by the model's plan and has every process hold the whole stream, sources of depth
attention included. Without gradients the models here do better (`attnres.model.token_shards`): the last projection of
a layer leaves its partial sums, which are scattered to the processes' own tokens, and the input of a layer is gathered.
With gradients everything stays as transformers has it, so that gradients of the residual connection are whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from ..errors import UsageError
from ..model.token_shards import TokenShards

LAST = ("o_proj", "down_proj", "dense", "dense_4h_to_h", "c_proj", "fc2")
"""Names of projections whose output is a sublayer's."""


class SharesTokens:
    """Comes before PreTrainedModel in a model's bases; the model's base model has `sublayers` of what adds to the
    stream."""

    config: Any

    @classmethod
    def maybe_distribute_model(cls, model: Any, distributed_config: Any, mesh: Any) -> Any:
        processes = 1 if distributed_config is None or mesh is None else distributed_config.tp_size
        if processes > 1:
            check_divides(model.config.get_text_config(), processes)
        model = super().maybe_distribute_model(model, distributed_config, mesh)  # type: ignore[misc]
        if processes > 1:
            tp_mesh = model._device_mesh["tp"] if model._device_mesh.ndim > 1 else model._device_mesh
            share_tokens(model.base_model, tp_mesh.get_group())
        return model


def check_divides(
    config: Any, processes: int, heads: Iterable[str] = ("num_attention_heads", "num_key_value_heads")
) -> None:
    """Raises UsageError if that number of processes cannot hold equal numbers of heads, named as in the config."""
    for name in heads:
        count = getattr(config, name, None)
        if count is not None and count % processes:
            raise UsageError(
                f"{name} must be a multiple of the tensor-parallel processes: {count} over {processes} leaves "
                f"{count % processes} over; start another number of processes"
            )


def share_tokens(base: Any, group: ProcessGroup) -> None:
    """Makes the last projections of all sublayers of a distributed base model leave their sums to `TokenShards`."""
    base.token_group = group
    for sublayer in base.sublayers():
        for name, module in sublayer.named_children():
            if name in LAST and _is_split_by_inputs(module):
                module.forward = _partial_forward(module, module.forward, group)
                sublayer.leaves_partial_sums = True


def shards_of(base: Any, tokens: int) -> TokenShards | None:
    """Where the tokens of a forward pass lie, or None if every process has all of them."""
    group = getattr(base, "token_group", None)
    return None if group is None or torch.is_grad_enabled() else TokenShards(group, tokens)


def _is_split_by_inputs(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(module, nn.Linear) and isinstance(weight, DTensor) and weight.placements[-1].is_shard(1)


def _partial_forward(
    module: Any, reduced: Callable[[Tensor], Tensor], group: ProcessGroup
) -> Callable[[Tensor], Tensor]:
    """The projection without the sum over processes where no gradients are asked for; the first one adds the bias."""

    def forward(x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return reduced(x)
        weight = _local(module.weight)
        if x.shape[-1] != weight.shape[-1]:  # plans with norms over all heads, or fused matrices, give it whole
            x = x.chunk(group.size(), -1)[group.rank()]
        return F.linear(x, weight, _local(module.bias) if group.rank() == 0 else None)

    return forward


def _local(parameter: Any) -> Any:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter
