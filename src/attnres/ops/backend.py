"""What a backend of depth attention is: two kinds of read, and everything else in terms of them.

A new backend writes those two and overrides what it can do in fewer passes; whatever it overrides stays the same
function. Arguments have been checked by `attnres.ops`, whose functions say what they mean. Everywhere a key norm may be
None, for a query that has been folded (`formulas.fold`).
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor

from . import formulas
from .formulas import Norm, Prior, scaled_norm


class Backend(ABC):
    two_phase_pays = False
    """Whether one phase 1 a block costs less than its layers' reads, in training too."""
    takes_slices = False
    """Whether single reads take queries of a part of the width; the formulas serve where they do not."""

    def declines(self, source: Tensor, num_sources: int) -> str | None:
        """Why it cannot serve a call with so many sources like `source`, in a sentence; None where it can."""
        return None

    @abstractmethod
    def read_with_weights(
        self, query: Tensor, sources: Sequence[Tensor], key_norm: Tensor | None, eps: float, scale: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """(h [..., D], softmax weights [n, ...]) of one read, `ops.depth_attention`."""

    @abstractmethod
    def inter_block(
        self, queries: Tensor, sources: Sequence[Tensor], key_norms: Tensor | None, eps: float
    ) -> tuple[list[Tensor], list[Tensor]]:
        """S reads [..., D] and their log-sum-exps [...]."""

    def read_norm(
        self, query: Tensor, sources: Sequence[Tensor], key_norm: Tensor | None, eps: float, *,
        scale: float = 1.0, norm: Norm | None = None, prior: Prior | None = None,
    ) -> Tensor:  # fmt: skip
        """One read and the norm that follows. prior: an earlier read that it goes on from."""
        if norm is not None:
            scale, norm = 1.0, scaled_norm(norm, scale)
        if prior is None:
            h = self.read_with_weights(query, sources, key_norm, eps, scale)[0]
        else:
            key_norms = None if key_norm is None else key_norm.unsqueeze(0)
            (out,), (lse,) = self.inter_block(query.unsqueeze(0), sources, key_norms, eps)
            h = formulas.join_reads(prior, (out, lse), scale)
        return self.rms_norm(h, norm)

    def read_norm_chained(
        self, query: Tensor, sources: Sequence[Tensor], key_norm: Tensor | None, eps: float, *,
        scale: float = 1.0, norm: Norm | None = None, prior: Prior | None = None,
    ) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
        """`read_norm`, and the sources for their next reader."""
        return self.read_norm(query, sources, key_norm, eps, scale=scale, norm=norm, prior=prior), list(sources)

    def inter_block_chained(
        self, queries: Tensor, sources: Sequence[Tensor], key_norms: Tensor | None, eps: float, *,
        scale: float = 1.0, norm: Norm | None = None,
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:  # fmt: skip
        """`inter_block`, its first read with its scale and norm if one follows, and the sources for their next
        reader."""
        outs, lses = self.inter_block(queries, sources, key_norms, eps)
        if norm is not None:
            outs = [self.rms_norm(outs[0], scaled_norm(norm, scale)), *outs[1:]]
        return outs, lses, list(sources)

    def merge_norm(
        self, query: Tensor, partial: Tensor | None, update: Tensor, key_norm: Tensor | None, out: Tensor, lse: Tensor,
        eps: float, *, scale: float = 1.0, norm: Norm | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """(partial + update, the read over it and phase 1's sources through the norm that follows)."""
        total = update if partial is None else partial + update
        if norm is not None:
            scale, norm = 1.0, scaled_norm(norm, scale)
        return total, formulas.rms_norm(formulas.merge(query, total, key_norm, out, lse, eps, scale), norm)

    def add_norm(self, stream: Tensor, update: Tensor, *, norm: Norm | None = None) -> tuple[Tensor, Tensor]:
        """(stream + update, its norm)."""
        total = stream + update
        return total, self.rms_norm(total, norm)

    def weighted_sum(self, weights: Tensor, sources: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """(sum_i weights[i] * sources[i], the sources for their next reader); weights [n] or [n, ...]."""
        return formulas.mix(weights, sources), list(sources)

    def rms_norm(self, h: Tensor, norm: Norm | None) -> Tensor:
        """RMSNorm over the last dimension; None leaves h as it is."""
        return formulas.rms_norm(h, norm)
