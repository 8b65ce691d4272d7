"""What benchmarks/training.py times: decoders that differ in their residual connection and share all other weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import timing
import torch
from torch import Tensor
from torch.nn import functional as F

from attnres.bench import rivals
from attnres.model import Decoder, DecoderConfig
from attnres.run import hardware


@dataclass(frozen=True)
class Shape:
    name: str
    config: DecoderConfig
    sequences: int

    @property
    def tokens(self) -> int:
        return self.sequences * self.config.max_position_embeddings


def shape(name: str, width: int, blocks: int, head_dim: int, sequences: int, context: int) -> Shape:
    heads = width // head_dim
    config = DecoderConfig(
        hidden_size=width, num_hidden_layers=blocks, num_attention_heads=heads, max_position_embeddings=context
    )
    return Shape(name, config, sequences)


@dataclass(frozen=True)
class Row:
    """A variant of a shape: a residual, whose op runs it, and how."""

    residual: str
    op: str = "attnres"
    compiled: bool = False
    checkpointed: bool = False

    @property
    def mode(self) -> str:
        return "compiled" if self.compiled else "checkpointed" if self.checkpointed else "eager"

    def __str__(self) -> str:
        return ", ".join([self.residual, *([] if self.op == "attnres" else [self.op]), self.mode])


class Nets:
    """Variants of one shape over shared weights."""

    def __init__(self, shape: Shape, device: torch.device, dtype: torch.dtype, found: dict[str, rivals.Rival]) -> None:
        self.shape, self.device, self.dtype, self.found = shape, device, dtype, found
        self.shared = Decoder(shape.config).to(device)
        generator = torch.Generator().manual_seed(0)
        size = (shape.sequences, shape.config.max_position_embeddings)
        self.ids = torch.randint(0, shape.config.vocab_size, size, generator=generator).to(device)

    def net(self, row: Row) -> Decoder:
        """A decoder whose layers are the shared ones."""
        config = DecoderConfig.from_dict({**self.shape.config.to_dict(), "residual": row.residual})
        net = copy.copy(self.shared)
        net._modules = dict(self.shared._modules)
        residual = config.build_residual().to(self.device)
        if row.residual != "prenorm":
            generator = torch.Generator().manual_seed(1)
            queries = torch.randn(residual.pseudo_query.shape, generator=generator) / config.hidden_size**0.5
            residual.pseudo_query.data.copy_(queries)
        if row.op != "attnres":
            residual = rivals.plug(residual, self.found[row.op])
        net.residual = residual
        if row.checkpointed:
            net.enable_checkpointing()
        return net

    def step(self, row: Row) -> Callable[[], Tensor]:
        """Forward and backward; the gradients stay until the next call. Returns the loss."""
        net = self.net(row)
        run = timing.compiled(net, fullgraph=row.op == "attnres") if row.compiled else net

        def step() -> Tensor:
            net.zero_grad(set_to_none=True)
            with hardware.autocast(self.device, self.dtype):
                logits = run(self.ids)
            loss = F.cross_entropy(logits.flatten(0, 1).float(), self.ids.flatten())
            loss.backward()
            return loss.detach()

        step.net = net  # type: ignore[attr-defined]
        return step

    @cache  # noqa: B019  lives as long as the run
    def expected(self, residual: str) -> list[Tensor]:
        """Loss and gradients with this library's reads, unscaled as the rivals' are: the norm that follows undoes it up
        to its eps, which matters where reads are small."""
        step = self.step(Row(residual))
        step.net.residual.stream_scale = False  # type: ignore[attr-defined]
        return observed(step)


def observed(step: Callable[[], Tensor]) -> list[Tensor]:
    """Loss, and the gradients that every read contributes to."""
    loss = step()
    net = step.net  # type: ignore[attr-defined]
    tensors = [loss, net.residual.pseudo_query.grad, net.residual.key_norm.grad, net.embed_tokens.weight.grad]
    return [t.detach().clone() for t in tensors]
