"""What Full and Block AttnRes share: one pseudo-query and one key norm a layer, and looking at the weights."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..errors import UsageError
from ..ops import formulas
from ..ops.dispatch import select
from .base import Residual, State, normed, split_scaled
from .weighing import Weighing

SCHEDULES = ("auto", "layerwise", "two_phase")


class DepthAttention(Residual):
    """Each layer attends over depth with a learned query instead of reading a plain sum (paper section 2).

    Parameters (row i = layer i, last row = the read in front of the output head):
        pseudo_query [L + 1, D]: zeros at init, so that training starts from an equal-weight mean.
        key_norm [L + 1, D]: weight of the RMSNorm on the keys, ones at init; absent with key_normalised=False.
        query_proj [L + 1, D, D], in place of pseudo_query with query="input": zeros at init.
        static_weight [L + 1, most sources], alone with mixing="static": n times the weights of a read of n sources,
        ones at init.
    """

    decoder_options = {"stream_scale": True}
    pseudo_query: Tensor
    key_norm: Tensor
    query_proj: Tensor
    static_weight: Tensor

    def __init__(
        self, dim: int, num_layers: int, eps: float, stream_scale: bool, schedule: str, **switches: Any
    ) -> None:
        super().__init__(dim, num_layers)
        if not eps >= 0:
            raise UsageError(f"eps must be zero or positive; it is {eps}")
        if schedule not in SCHEDULES:
            raise UsageError(f"schedule must be one of {', '.join(SCHEDULES)}; it is {schedule!r}")
        self.weighing = Weighing(dim, **switches)
        if schedule == "two_phase" and not self.weighing.fused:
            raise UsageError(
                "schedule='two_phase' is for the published weights with any temperature; take 'auto' with other "
                f"switches, which are{str(self.weighing)[1:]}"
            )
        self.eps = eps
        self.stream_scale = stream_scale
        self.schedule = schedule
        self.fused = self.weighing.fused

    def add_parameters(self) -> None:
        """Makes the parameters that the weights need; called when the number of sources of every layer is known."""
        rows = self.num_layers + 1
        most = max(self.num_sources(layer) for layer in range(rows))
        shapes = {"query_proj": (rows, self.dim, self.dim), "static_weight": (rows, most)}
        self.layer_parameters = self.weighing.parameters
        for name in self.layer_parameters:
            setattr(self, name, nn.Parameter(torch.empty(shapes.get(name, (rows, self.dim)))))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for name in self.layer_parameters:
            (nn.init.zeros_ if name in ("pseudo_query", "query_proj") else nn.init.ones_)(getattr(self, name))

    def reads_depth(self, layer: int) -> bool:
        """Whether `layer` (num_layers: the output read) has a read of its own."""
        return True

    @abstractmethod
    def sources(self, state: State, layer: int) -> tuple[Tensor, ...]:
        """What `layer` (num_layers: the output read) attends over, oldest first; the embedding is always there."""

    @abstractmethod
    def num_sources(self, layer: int) -> int:
        """How many sources that read has; 0 for a layer without a read."""

    def depth_weights(self, state: State, layer: int) -> Tensor:
        """Weights [num_sources, ...] of the read of `layer` (num_layers: the output read); [num_sources, ..., heads]
        where there are several heads; [0, ...] for a layer without a read."""
        sources = self.sources(state, layer)
        if not self.reads_depth(layer):
            return sources[0].new_empty(0, *sources[0].shape[:-1])
        return self.weights_over(layer, sources)

    def weights_over(self, layer: int, sources: tuple[Tensor, ...]) -> Tensor:
        """The weights of `layer` over given sources, as `depth_weights` gives them."""
        if not self.weighing.published:
            return self.attend(layer, sources, 1.0)[1]
        query, key_norm = self.rows(layer)
        return ops.depth_attention(query, sources, key_norm, self.eps, return_weights=True)[1]

    def rows(self, first: int, last: int | None = None) -> tuple[Tensor, Tensor]:
        """(pseudo-query, key norm): [D] each for layer `first`, [last - first, D] for layers first .. last - 1.

        A temperature is in the pseudo-query. With heads a layer's rows are [H, D / H].
        """
        row = first - self.first_layer
        index = row if last is None else slice(row, last - self.first_layer)
        query, key_norm = self.pseudo_query[index], self.key_norm[index]
        if self.weighing.heads > 1:
            slices = (self.weighing.heads, -1)
            query, key_norm = query.unflatten(-1, slices), key_norm.unflatten(-1, slices)
        temperature = self.weighing.temperature
        return query if temperature == 1.0 else query / temperature, key_norm

    def folded_queries(self, embedding: Tensor) -> Tensor | None:
        """The products of queries and key norms, [L + 1, D], for all reads of a pass without gradients.

        None where they do not pay: kernels of a GPU fold for nothing, and a lean state has no room.
        """
        if torch.is_grad_enabled() or embedding.is_cuda or self.lean or not self.fused:
            return None
        return ops.fold(*self.rows(self.first_layer, self.num_layers + 1), embedding.dtype)

    def queries(self, folded: Tensor | None, first: int, last: int | None = None) -> tuple[Tensor, Tensor | None]:
        """What `rows` gives, for ops; the folded queries and None if there are some and no gradients."""
        if folded is None or torch.is_grad_enabled():
            return self.rows(first, last)
        row = first - self.first_layer
        return folded[row] if last is None else folded[row : last - self.first_layer], None

    def read_flops(self, layer: int) -> int:
        # without a read an output is added to a second sum
        return self.weighing.flops(self.num_sources(layer)) if self.reads_depth(layer) else self.dim

    def scale(self, num_sources: int) -> float:
        return self.weighing.inverse_mean(num_sources) if self.stream_scale else 1.0

    def two_phase(self, tensor: Tensor) -> bool:
        """Whether phase 1 serves a whole block. On CPUs it pays in C, and without gradients unless a compiler fuses the
        single reads; a lean state cannot carry its results, whatever the schedule."""
        if self.lean or not self.fused:
            return False
        if self.schedule == "auto":
            recorded = torch.is_grad_enabled() or torch.compiler.is_compiling()
            return tensor.is_cuda or not recorded or select(tensor).two_phase_pays
        return self.schedule == "two_phase"

    def single_read(
        self, sources: tuple[Tensor, ...], layer: int, norm: nn.Module | None, folded: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """One layer's read over `sources`; also the sources for its successors, so that gradients run as a chain.

        folded: the result of `folded_queries`.
        """
        if len(sources) == 1 and self.weighing.one_source_is_itself:
            return normed(sources[0], norm), sources
        scale = self.scale(len(sources))
        if not self.weighing.published:
            inside, behind = (scale, 1.0) if norm is None else (1.0, scale)
            return normed(self.attend(layer, sources, inside)[0], norm, behind), sources
        fold, inside, rest, behind = split_scaled(norm, self.dim, scale)
        query, key_norm = self.queries(folded, layer)
        if layer == self.num_layers:  # nobody reads after the output read
            x = ops.read_norm(query, sources, key_norm, self.eps, scale=inside, norm=fold)
            return normed(x, rest, behind), sources
        x, handed_on = ops.read_norm_chained(query, sources, key_norm, self.eps, scale=inside, norm=fold)
        return normed(x, rest, behind), tuple(handed_on)

    def attend(self, layer: int, sources: tuple[Tensor, ...], scale: float) -> tuple[Tensor, Tensor]:
        """(the read of `layer` times scale, [..., D]; its weights as `depth_weights` gives them), in plain PyTorch."""
        weighing = self.weighing
        if weighing.mixing == "static":
            dtype, n = formulas.statistics_dtype(sources[0].dtype), len(sources)
            weights = self.row("static_weight", layer)[:n].to(dtype) / n
            shown = weights.view(n, *[1] * (sources[0].dim() - 1)).expand(n, *sources[0].shape[:-1])
            return formulas.mix(weights * scale, sources), shown
        query = self.row("pseudo_query" if weighing.query == "learned" else "query_proj", layer)
        key_norm = self.row("key_norm", layer) if weighing.key_normalised else None
        weights, values = weighing.weights(query, sources, key_norm, self.eps)
        h = formulas.mix(weights * scale, values)
        return h if weighing.heads == 1 else h.flatten(-2), weights

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, eps={self.eps}, stream_scale={self.stream_scale}, "
            f"schedule={self.schedule!r}{self.weighing}"
        )
