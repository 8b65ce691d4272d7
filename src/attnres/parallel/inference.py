"""Tensor parallelism without gradients: prefill and decoding of a decoder that several processes hold together.

As in training (`tensor`), every matrix is split over the processes and the residual stream along the sequence; here on
plain tensors throughout, with any number of tokens, a cache of each process's own heads, and nothing kept for a
backward pass. `attnres.model.token_shards` says what travels when.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, distributed, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional as F

from ..model import Decoder
from ..model.layer import layers_of
from ..model.token_shards import TokenShards
from .config import ParallelConfig
from .tensor import split_parameters


def apply(model: Decoder, mesh: DeviceMesh) -> None:
    """Leaves `model` this process's share of every matrix, in place, and no gradients.

    Each process then calls it, or `attnres.model.generate`, with the same token ids and gets all logits; a cache holds
    this process's heads. The 1-D `mesh` has the processes; weights must be equal on all of them.

    Raises UsageError for a number of processes that does not divide heads or inner widths, and for adapters.
    """
    ParallelConfig(tp=mesh.size()).check(mesh.size(), model.config, batch_size=1, context=mesh.size())
    group = mesh.get_group()
    model.requires_grad_(False)
    for layer in layers_of(model):
        layer.leaves_partial_sums = True  # type: ignore[assignment]
        layer.processes, layer.total = group.size(), partial(_total, group=group)
        for module, name, dim in list(split_parameters(layer)):
            module.register_parameter(name, _own_part(module.get_parameter(name), dim, group))
    _split_vocabulary(model, group)
    model.split_tokens = partial(TokenShards, group)


def _total(part: Tensor, group: ProcessGroup) -> Tensor:
    whole = part.contiguous()
    distributed.all_reduce(whole, group=group)
    return whole


def _own_part(whole: Tensor, dim: int, group: ProcessGroup) -> nn.Parameter:
    return nn.Parameter(whole.chunk(group.size(), dim)[group.rank()].clone(), requires_grad=False)


def _split_vocabulary(model: Decoder, group: ProcessGroup) -> None:
    """Rows of the embedding and of the head; the last process's are filled up with zeros."""
    embedding, head, size = model.embed_tokens, model.lm_head, model.config.vocab_size
    rows = -(-size // group.size())
    first = rows * group.rank()
    missing = rows * group.size() - size

    def own_rows(weight: Tensor) -> nn.Parameter:
        return _own_part(F.pad(weight, (0, 0, 0, missing)), 0, group)

    def look_up(ids_BT: Tensor) -> Tensor:
        row_BT = ids_BT - first
        is_own_BT = (row_BT >= 0) & (row_BT < rows)
        found_BTD = F.embedding(row_BT.clamp(0, rows - 1), embedding.weight) * is_own_BT.unsqueeze(-1)
        distributed.all_reduce(found_BTD, group=group)
        return found_BTD

    def all_logits(hidden_BTD: Tensor) -> Tensor:
        own_BTR = F.linear(hidden_BTD, head.weight)
        parts_PBTR = own_BTR.new_empty(group.size(), *own_BTR.shape)
        distributed.all_gather_into_tensor(parts_PBTR.flatten(0, 1), own_BTR.contiguous(), group)
        return torch.cat(parts_PBTR.unbind(), -1)[..., :size]

    tied = head.weight is embedding.weight
    embedding.weight = own_rows(embedding.weight)
    head.weight = embedding.weight if tied else own_rows(head.weight)
    embedding.forward, head.forward = look_up, all_logits  # type: ignore[method-assign, assignment]
