"""Depth attention without gradients, for CPUs above all: few calls for few tokens, chunks that fit a cache for many.

In decoding a call of PyTorch costs more than its arithmetic, and so does one of Python. So the sources of a read are
stacked, all queries of a block meet them in one product of matrices, and the code of a merge is one piece. With u = w *
g, in the statistics dtype:

    z = <u, v> rsqrt(|v|^2 + D eps) sqrt(D)              the logits
    rest = sigmoid(lse - z),   h = s + rest (o - s)      the merge of a partial sum s with phase 1's (o, lse)

`dispatch` takes it for the eager backend where gradients are off. A compiler gets `eager`, which it fuses.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.linalg import vector_norm
from torch.nn.functional import linear

from . import formulas
from .backend import Backend
from .formulas import Norm, Prior, fold, statistics_dtype

CHUNK = 1 << 19
"""Elements of the sources that are computed at a time, for each thread of PyTorch."""
FEW = 1 << 14
"""Elements up to which PyTorch's own RMSNorm is the faster one."""


class NoGrad(Backend):
    def read_with_weights(
        self, query: Tensor, sources: Sequence[Tensor], key_norm: Tensor | None, eps: float, scale: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        folded, dtype = fold(query, key_norm, sources[0].dtype).unsqueeze(0), sources[0].dtype

        def read(*sources: Tensor) -> tuple[Tensor, Tensor]:
            h, _, log_weights = _reads(folded, sources, eps)
            return _normalised(h.squeeze(-2), scale, None, dtype), log_weights.squeeze(-1).exp()

        h, weights = _in_chunks(read, *sources)
        return h, weights.movedim(-1, 0)

    def inter_block(
        self, queries: Tensor, sources: Sequence[Tensor], key_norms: Tensor | None, eps: float
    ) -> tuple[list[Tensor], list[Tensor]]:
        folded, dtype = fold(queries, key_norms, sources[0].dtype), sources[0].dtype
        if len(sources) == 1:  # the read of one source is that source
            (lses,) = _in_chunks(lambda source: (_logits(folded, source.to(folded.dtype), eps),), *sources)
            return [sources[0]] * len(folded), list(lses.unbind(-1))

        def reads(*sources: Tensor) -> tuple[Tensor, Tensor]:
            outs, logits, log_weights = _reads(folded, sources, eps)
            # exact where the likeliest source is, whose weight is no small number
            return outs.to(dtype), logits.amax(-2) - log_weights.amax(-2)

        outs, lses = _in_chunks(reads, *sources)
        return list(outs.unbind(-2)), list(lses.unbind(-1))

    def read_norm(
        self, query: Tensor, sources: Sequence[Tensor], key_norm: Tensor | None, eps: float, *,
        scale: float = 1.0, norm: Norm | None = None, prior: Prior | None = None,
    ) -> Tensor:  # fmt: skip
        if prior is not None:
            return super().read_norm(query, sources, key_norm, eps, scale=scale, norm=norm, prior=prior)
        folded, dtype = fold(query, key_norm, sources[0].dtype).unsqueeze(0), sources[0].dtype

        def read(*sources: Tensor) -> tuple[Tensor]:
            return (_normalised(_reads(folded, sources, eps)[0].squeeze(-2), scale, norm, dtype),)

        return _in_chunks(read, *sources)[0]

    def merge_norm(
        self, query: Tensor, partial: Tensor | None, update: Tensor, key_norm: Tensor | None, out: Tensor, lse: Tensor,
        eps: float, *, scale: float = 1.0, norm: Norm | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        total = update if partial is None else partial + update
        folded = query if key_norm is None else fold(query, key_norm, total.dtype)
        if _whole(total):
            return total, _merged(total, out, lse, folded, eps, scale, norm)

        def merged(total: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor]:
            return (_merged(total, out, lse, folded, eps, scale, norm),)

        return total, _in_chunks(merged, total, out, lse)[0]

    def rms_norm(self, h: Tensor, norm: Norm | None) -> Tensor:
        if norm is None or h.numel() <= FEW:
            return formulas.rms_norm(h, norm)
        return _in_chunks(lambda rows: (_normalised(rows.to(statistics_dtype(h.dtype)), 1.0, norm, h.dtype),), h)[0]


def _reads(folded: Tensor, sources: Sequence[Tensor], eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(reads [..., S, D], logits and logarithms of weights [..., n, S]) in the dtype of the folded queries [S, D]."""
    values = torch.stack(tuple(sources), -2).to(folded.dtype)
    logits = _logits(folded, values, eps)
    log_weights = logits.log_softmax(-2)
    return log_weights.exp().mT @ values, logits, log_weights


def _logits(folded: Tensor, values: Tensor, eps: float) -> Tensor:
    """Logits [..., S] of folded queries [S, D] for values [..., D]."""
    width = values.shape[-1]
    rstd = vector_norm(values, dim=-1, keepdim=True).square_().add_(width * eps).rsqrt_().mul_(math.sqrt(width))
    return linear(values, folded).mul_(rstd)


def _merged(
    total: Tensor, out: Tensor, lse: Tensor, folded: Tensor, eps: float, scale: float, norm: Norm | None
) -> Tensor:
    statistics, width = folded.dtype, total.shape[-1]
    value = total.to(statistics)
    rstd = vector_norm(value, dim=-1).square_().add_(width * eps).rsqrt_()
    rest = torch.addcmul(lse, value @ folded, rstd, value=-math.sqrt(width)).sigmoid_()
    return _normalised(torch.lerp(value, out.to(statistics), rest.unsqueeze(-1)), scale, norm, total.dtype)


def _normalised(h: Tensor, scale: float, norm: Norm | None, dtype: torch.dtype) -> Tensor:
    """scale * h through the norm, in `dtype`; an RMSNorm takes a scale away again, but for its eps."""
    if norm is None:
        return (h if scale == 1.0 else h * scale).to(dtype)
    weight, eps = norm
    width = h.shape[-1]
    rstd = vector_norm(h, dim=-1, keepdim=True).square_().add_(width * eps / scale**2).rsqrt_()
    x = h * rstd.mul_(math.sqrt(width))
    return (x if weight is None else x.mul_(weight.to(x.dtype))).to(dtype)


def _whole(rows: Tensor, count: int = 1) -> bool:
    """Whether `count` tensors like `rows` need neither chunks nor shelter from autocast, by a glance."""
    return rows.is_cpu and rows.numel() * count <= CHUNK and not torch.is_autocast_enabled("cpu")


def _in_chunks(call: Callable[..., tuple[Tensor, ...]], *tensors: Tensor) -> tuple[Tensor, ...]:
    """call(*tensors) outside autocast, on a CPU for as many tokens at a time as its cache takes. Tokens are the first
    dimensions of all tensors and results; the first tensor has one dimension more."""
    first = tensors[0]
    if _whole(first, len(tensors)):
        return call(*tensors)
    leading = first.shape[:-1]
    size = max(1, CHUNK * torch.get_num_threads() // (first.shape[-1] * len(tensors)))
    with torch.autocast(first.device.type, enabled=False):
        if leading.numel() <= size or not first.is_cpu:
            return call(*tensors)
        wholes: list[Tensor] = []
        pieces = (tensor.flatten(0, len(leading) - 1).split(size) for tensor in tensors)
        for i, piece in enumerate(zip(*pieces, strict=True)):
            parts = call(*piece)
            wholes = wholes or [part.new_empty(leading.numel(), *part.shape[1:]) for part in parts]
            for whole, part in zip(wholes, parts, strict=True):
                whole[i * size : i * size + len(part)] = part
    return tuple(whole.view(*leading, *whole.shape[1:]) for whole in wholes)
