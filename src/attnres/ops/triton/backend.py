"""The Triton backend: depth attention on GPUs, with the residual add and the following RMSNorm folded in.

For bf16, fp16 and fp32 tensors on CUDA devices, up to 8192 wide and 256 sources; a call is one launch where it can be.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..autograd import differentiates, distinct
from ..backend import Backend
from ..formulas import Norm, Prior, scaled_norm
from .chain import called
from .inter_block import InterBlock, inter_block, inter_block_op, norm_fits
from .launch import unsupported
from .merge import Merge, merge, merge_op
from .norm import AddNorm, add_norm, add_norm_op
from .read import Read, read, read_op


class Triton(Backend):
    def declines(self, source: Tensor, num_sources: int) -> str | None:
        return unsupported(source, num_sources)

    def read_with_weights(
        self, query: Tensor, sources: Sequence[Tensor], key_norm: Tensor | None, eps: float, scale: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """The weights are fp32 and without gradient."""
        h, stats = _read(query, sources, key_norm, eps, scale)
        n = len(sources)
        return h, torch.exp(stats[..., :n] - stats[..., 2 * n : 2 * n + 1]).movedim(-1, 0)

    def inter_block(
        self, queries: Tensor, sources: Sequence[Tensor], key_norms: Tensor | None, eps: float
    ) -> tuple[list[Tensor], list[Tensor]]:
        return self.inter_block_chained(queries, sources, key_norms, eps)[:2]

    def read_norm(
        self, query: Tensor, sources: Sequence[Tensor], key_norm: Tensor | None, eps: float, *,
        scale: float = 1.0, norm: Norm | None = None, prior: Prior | None = None,
    ) -> Tensor:  # fmt: skip
        return _read(query, sources, key_norm, eps, scale, norm, prior)[0]

    def read_norm_chained(
        self, query: Tensor, sources: Sequence[Tensor], key_norm: Tensor | None, eps: float, *,
        scale: float = 1.0, norm: Norm | None = None, prior: Prior | None = None,
    ) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
        x, _, *handed_on = _read(query, sources, key_norm, eps, scale, norm, prior, hand_on=True)
        return x, handed_on

    def inter_block_chained(
        self, queries: Tensor, sources: Sequence[Tensor], key_norms: Tensor | None, eps: float, *,
        scale: float = 1.0, norm: Norm | None = None,
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:  # fmt: skip
        key_norms = torch.ones_like(queries) if key_norms is None else key_norms
        backward = differentiates(queries, key_norms, norm and norm[0], *sources)
        if norm is not None and not norm_fits(sources[0], len(sources), len(queries), backward):
            outs, lses, sources = self.inter_block_chained(queries, sources, key_norms, eps)
            return [self.rms_norm(outs[0], scaled_norm(norm, scale)), *outs[1:]], lses, sources
        weight, norm_eps = norm or (None, None)
        if backward:
            results = InterBlock.apply(*distinct(queries, key_norms, weight, eps, norm_eps, scale, *sources))
            outs, lse, handed_on = results[: len(queries)], results[len(queries)], results[len(queries) + 1 :]
        else:
            inputs = (queries, key_norms, list(sources), weight, eps, norm_eps, scale, len(sources) > 1)
            outs, lse, _, _ = called(inter_block, inter_block_op)(*inputs)
            outs, handed_on = [*outs, *[sources[0]] * (len(queries) - len(outs))], sources
        return list(outs), list(lse.unbind(0)), list(handed_on)

    def merge_norm(
        self, query: Tensor, partial: Tensor | None, update: Tensor, key_norm: Tensor | None, out: Tensor, lse: Tensor,
        eps: float, *, scale: float = 1.0, norm: Norm | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        key_norm = torch.ones_like(query) if key_norm is None else key_norm
        weight, norm_eps = norm or (None, None)
        inputs = (query, key_norm, partial, update, out, lse, weight, eps, norm_eps, scale)
        if differentiates(query, key_norm, partial, update, out, lse, weight):
            return Merge.apply(*distinct(*inputs))
        total, x, _ = called(merge, merge_op)(*inputs)
        return update if partial is None else total, x

    def add_norm(self, stream: Tensor, update: Tensor, *, norm: Norm | None = None) -> tuple[Tensor, Tensor]:
        return super().add_norm(stream, update) if norm is None else _add_norm(stream, update, norm)

    def rms_norm(self, h: Tensor, norm: Norm | None) -> Tensor:
        return h if norm is None else _add_norm(None, h, norm)[1]


TRITON = Triton()


def _read(
    query: Tensor, sources: Sequence[Tensor], key_norm: Tensor | None, eps: float, scale: float,
    norm: Norm | None = None, prior: Prior | None = None, hand_on: bool = False,
) -> tuple[Tensor, ...]:  # fmt: skip
    """x, what backward needs, and the sources if they are to be handed on."""
    key_norm = torch.ones_like(query) if key_norm is None else key_norm
    (weight, norm_eps), (out, lse) = norm or (None, None), prior or (None, None)
    if differentiates(query, key_norm, out, lse, weight, *sources):
        return Read.apply(*distinct(query, key_norm, out, lse, weight, eps, norm_eps, scale, hand_on, *sources))
    results: Any = called(read, read_op)(query, key_norm, list(sources), out, lse, weight, eps, norm_eps, scale)
    return *results, *(sources if hand_on else ())


def _add_norm(stream: Tensor | None, update: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    if differentiates(stream, update, norm[0]):
        return AddNorm.apply(*distinct(stream, update, *norm))
    total, x, _ = called(add_norm, add_norm_op)(stream, update, *norm)
    return update if stream is None else total, x
