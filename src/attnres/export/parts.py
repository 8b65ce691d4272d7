"""A model's tensors, one part of `names`' table after the other, in the order of its layers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import UsageError
from ..hf.kimi_k3.names import ATTENTION, FEED_FORWARD, OUTPUT_READ, OUTSIDE, READS, Name, Read
from ..model.decoder import Backbone


class Part(NamedTuple):
    """name: its row of the table; layer: Kimi K3's, from 0, None outside; tensors: ours, for a Read (query, key norm),
    [D] each."""

    name: Name | Read
    layer: int | None
    tensors: tuple[Tensor, ...]


@torch.no_grad()
def parts(model: Any, backbone: Backbone) -> Iterator[Part]:
    """The parts of a model that `fit` has passed; each is a view of the model's own weights or made when it is due.

    Raises UsageError for a tensor that the table has no row for.
    """
    embedding, norm, head = OUTSIDE
    yield Part(embedding, None, (backbone.embed_tokens.weight.detach(),))
    for layer, kind in enumerate(backbone.config.attention_kinds):
        yield from _layer(backbone, layer, kind)
    yield Part(OUTPUT_READ, None, _read(backbone, backbone.config.num_layers))
    yield Part(norm, None, (backbone.norm.weight.detach(),))
    yield Part(head, None, (model.lm_head.weight.detach(),))


def _layer(backbone: Backbone, layer: int, kind: str) -> Iterator[Part]:
    mlp = "experts" if backbone.config.has_experts(layer) else "swiglu"
    for half, names in enumerate((ATTENTION[kind], FEED_FORWARD[mlp])):
        own = 2 * layer + half
        yield Part(READS[half], layer, _read(backbone, own))
        tensors: dict[str, Tensor] = dict(backbone.layers[own].state_dict())
        if "g_a_proj.weight" in tensors:  # two factors of what is one matrix there
            down, up = (tensors.pop(f"g_{x}_proj.weight") for x in ("a", "b"))
            tensors["g_proj.weight"] = (up.double() @ down.double()).to(up.dtype)
        for name in names:
            if name.ours in tensors:
                yield Part(name, layer, (tensors.pop(name.ours),))
        if tensors:
            raise UsageError(
                f"Kimi K3 has no place for {next(iter(tensors))} of layer {own}; export a model without it"
            )


def _read(backbone: Any, layer: int) -> tuple[Tensor, Tensor]:
    query, key_norm = backbone.residual.rows(layer)
    return query.detach(), key_norm.detach()
