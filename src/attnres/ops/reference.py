"""The reference: depth attention by its formulas, the truth that every faster backend is tested against.

Runs on any device and dtype; autograd differentiates through everything. Paper: sections 2 and 4 (Full AttnRes and the
two-phase computation), arXiv 2603.15031.
"""

from collections.abc import Sequence

from torch import Tensor

from .backend import Backend
from .formulas import fold, keys, logits, mix


class Reference(Backend):
    takes_slices = True

    def read_with_weights(
        self, query: Tensor, sources: Sequence[Tensor], key_norm: Tensor | None, eps: float, scale: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        weights = logits(query, keys(query, sources), key_norm, eps).softmax(0)
        return mix(weights * scale, sources), weights

    def inter_block(
        self, queries: Tensor, sources: Sequence[Tensor], key_norms: Tensor | None, eps: float
    ) -> tuple[list[Tensor], list[Tensor]]:
        outs, lses = [], []
        for query in fold(queries, key_norms, sources[0].dtype):
            scores = logits(query, sources, None, eps)
            lses.append(scores.logsumexp(0))
            outs.append(mix(scores.softmax(0), sources))
        return outs, lses
