"""Full AttnRes: every layer attends over the embedding and all earlier layer outputs (paper section 2).

Two schedules give the same function. Layer by layer: each read attends over all its sources. Two-phase (paper section
4): layers are taken in groups of about sqrt(L); when a group begins one pass over everything before it serves all its
layers, and each layer's read over its own group's outputs goes on from it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ... import ops
from ...errors import UsageError
from ..base import check_turn, normed, split_norm, split_scaled
from ..depth_attention import DepthAttention
from ..registry import register


class FullState(NamedTuple):
    """outputs: the embedding and every layer output so far, each [..., D]; outs, lses: phase 1's results for the layers
    of the present group that have not read yet (two-phase only); folded: all queries, folded, in a pass without
    gradients."""

    outputs: tuple[Tensor, ...]
    outs: tuple[Tensor, ...]
    lses: tuple[Tensor, ...]
    folded: Tensor | None = None


@register("full_attnres")
class FullAttnRes(DepthAttention):
    """Full AttnRes.

    Args:
        dim: width D.
        num_layers: L; every attention and every MLP is one layer.
        eps: of the key norm.
        stream_scale: multiply each read by its number of sources. At zero queries a read is then the plain residual sum
            itself and not its mean, so that the eps of the norm that follows never bites (the decoder's default).
        schedule: "layerwise"; "two_phase" unless the state must stay lean; or "auto": two-phase on CUDA and, in
            training with the native backend, on CPUs, unless the state must stay lean or there is a window, else
            layerwise.
        window: W, attend to the embedding and the last W layer outputs only; None for all.
        query: "learned", the pseudo-query w_l; or "input", W_l RMSNorm(v) / D of the newest source v with a D x D
            matrix a layer.
        mixing: "softmax" over the sources; "sigmoid" of each logit alone; or "static", learned scalars without
            queries and keys.
        key_normalised: RMSNorm on the keys; without it a key is the source itself.
        heads: H, slices of the width that attend with weights of their own.
        null_source: add a source of zeros to the softmax, so that a layer may turn away from all others (softmax1).
        temperature: divides the logits.

    All from `query` on are switches of the paper's ablation (section 8), but for the null source and the temperature;
    at their start all of them weigh equally. Raises UsageError for bad values and for switches that exclude each other.
    """

    def __init__(
        self,
        dim: int,
        num_layers: int,
        *,
        eps: float = 1e-6,
        stream_scale: bool = False,
        schedule: str = "auto",
        window: int | None = None,
        query: str = "learned",
        mixing: str = "softmax",
        key_normalised: bool = True,
        heads: int = 1,
        null_source: bool = False,
        temperature: float = 1.0,
    ) -> None:
        switches = dict(query=query, mixing=mixing, key_normalised=key_normalised, heads=heads)
        super().__init__(
            dim, num_layers, eps, stream_scale, schedule, **switches, null_source=null_source, temperature=temperature
        )
        if window is not None and (not isinstance(window, int) or window < 1):
            raise UsageError(f"window must be a positive whole number of layer outputs, or None; it is {window!r}")
        if window is not None and schedule == "two_phase":
            raise UsageError("schedule='two_phase' reads all layer outputs at once; take 'auto' with a window")
        self.window = window
        self.group_size = group_size(num_layers)
        self.add_parameters()

    def start(self, embedding: Tensor) -> FullState:
        return FullState((embedding,), (), (), self.folded_queries(embedding))

    def read(self, state: FullState, layer: int, norm: nn.Module | None = None) -> tuple[Tensor, FullState]:
        if self._opens_group(state, layer):
            return self._open_group(state, layer, norm)
        if state.outs and layer < self.num_layers:
            return self._go_on(state, layer, norm)
        x, outputs = self.single_read(state.outputs, layer, norm, state.folded)
        return x, FullState(outputs, (), (), state.folded)

    def write(self, state: FullState, layer: int, output: Tensor) -> FullState:
        embedding, *outputs = (*state.outputs, output)
        return state._replace(outputs=(embedding, *(outputs if self.window is None else outputs[-self.window :])))

    def latest(self, state: FullState) -> Tensor:
        return state.outputs[-1]

    def sources(self, state: FullState, layer: int) -> tuple[Tensor, ...]:
        return state.outputs

    def tensor_names(self, state: FullState, layer: int) -> list[str]:
        kept = len(state.outputs) - 1
        return ["output 0", *(f"output {i}" for i in range(layer - kept + 1, layer + 1))]

    def num_sources(self, layer: int) -> int:
        return 1 + (layer if self.window is None else min(layer, self.window))

    def two_phase(self, tensor: Tensor) -> bool:
        """Whether phase 1 serves a whole group. On CPUs single reads are faster without gradients."""
        chosen = self.schedule == "two_phase" or tensor.is_cuda or torch.is_grad_enabled()
        return chosen and super().two_phase(tensor)

    def _opens_group(self, state: FullState, layer: int) -> bool:
        if layer % self.group_size or layer == self.num_layers or self.window is not None:
            return False
        # for one layer or one source it does not pay
        if self.schedule == "auto" and (self.group_size == 1 or layer == 0):
            return False
        return self.two_phase(state.outputs[0])

    def _open_group(self, state: FullState, layer: int, norm: nn.Module | None) -> tuple[Tensor, FullState]:
        queries, key_norms = self.queries(state.folded, layer, min(layer + self.group_size, self.num_layers))
        fold, rest = split_norm(norm, self.dim)
        scale = self.scale(len(state.outputs))
        (x, *outs), lses, outputs = ops.inter_block_chained(
            queries, state.outputs, key_norms, self.eps, scale=scale, norm=fold
        )
        after = FullState(tuple(outputs), tuple(outs), tuple(lses[1:]), state.folded)
        return x if fold else normed(x, rest, scale), after

    def _go_on(self, state: FullState, layer: int, norm: nn.Module | None) -> tuple[Tensor, FullState]:
        """One read over the outputs of the layer's own group that goes on from phase 1's."""
        start = layer - layer % self.group_size
        first, left = start + 1, min(start + self.group_size, self.num_layers) - layer
        check_turn(len(state.outs) == left and len(state.outputs) == layer + 1, "read", layer)
        earlier, own = state.outputs[:first], state.outputs[first:]
        fold, inside, rest, behind = split_scaled(norm, self.dim, self.scale(len(state.outputs)))
        query, key_norm = self.queries(state.folded, layer)
        x, handed_on = ops.read_norm_chained(
            query,
            own,
            key_norm,
            self.eps,
            scale=inside,
            norm=fold,
            prior=(state.outs[0], state.lses[0]),
        )
        after = FullState((*earlier, *handed_on), state.outs[1:], state.lses[1:], state.folded)
        return normed(x, rest, behind), after

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.window is None else f", window={self.window}")


def group_size(num_layers: int) -> int:
    """Layers in a group of the two-phase schedule: a divisor of their number between its root and half as much again,
    or the root, rounded up. A short last group would pay for a pass over everything before it like a whole one."""
    root = math.isqrt(num_layers - 1) + 1
    sizes = range(root, int(1.5 * math.sqrt(num_layers)) + 1)
    return next((size for size in sizes if num_layers % size == 0), root)
