"""How a read of AttnRes weighs its sources: the published form, and every switch of the paper's ablation (section 8).

    z_i = q . k_i / temperature              q = w_l, or W_l RMSNorm(v_newest) / D;  k_i = RMSNorm_l(v_i), or v_i
    a   = softmax(z) | exp(z) / (1 + sum_j exp(z_j)) | sigmoid(z) | learned scalars
    h   = sum_i a_i v_i                      on the whole width, or on each of H slices of it with weights of its own

The second form of `a` is softmax with a null source, a key and a value of zeros: a read may then be less than a mean
(softmax1; arXiv 2605.17887 puts it into AttnRes). The published form runs on `ops`, with heads layer by layer alone; a
temperature goes into its query. The others are plain PyTorch, for autograd to differentiate and a compiler to fuse.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import UsageError
from ..ops import formulas

QUERIES = ("learned", "input")
MIXINGS = ("softmax", "sigmoid", "static")


@dataclass(frozen=True)
class Weighing:
    """The switches; `FullAttnRes` says what each means. Raises UsageError for values that make no sense together."""

    dim: int
    query: str = "learned"
    mixing: str = "softmax"
    key_normalised: bool = True
    heads: int = 1
    null_source: bool = False
    temperature: float = 1.0

    def __post_init__(self) -> None:
        for name, known in (("query", QUERIES), ("mixing", MIXINGS)):
            if getattr(self, name) not in known:
                raise UsageError(f"{name} must be one of {', '.join(known)}; it is {getattr(self, name)!r}")
        if not isinstance(self.heads, int) or self.heads < 1 or self.dim % self.heads:
            raise UsageError(
                f"heads must be a positive whole number that divides the width, {self.dim}; it is {self.heads!r}"
            )
        if not 0 < self.temperature < math.inf:
            raise UsageError(f"temperature must be positive and finite; it is {self.temperature!r}")
        if self.mixing != "softmax" and self.null_source:
            raise UsageError(f"null_source is a source of a softmax; leave it out with mixing={self.mixing!r}")
        if self.mixing == "static":
            defaults = {"query": "learned", "key_normalised": True, "heads": 1, "temperature": 1.0}
            for name, value in defaults.items():
                if getattr(self, name) != value:
                    raise UsageError(f"mixing='static' has neither queries nor keys; leave {name} at {value!r}")

    @property
    def fused(self) -> bool:
        """Whether the fused ops compute it, in one phase or two."""
        return self.published and self.heads == 1

    @property
    def published(self) -> bool:
        """Whether it is the published form, on slices of the width perhaps: `ops` has its single reads."""
        return self == Weighing(self.dim, heads=self.heads, temperature=self.temperature)

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the parameters that it has."""
        if self.mixing == "static":
            return ("static_weight",)
        return ("pseudo_query" if self.query == "learned" else "query_proj", *["key_norm"] * self.key_normalised)

    @property
    def one_source_is_itself(self) -> bool:
        """Whether a single source always has the weight 1."""
        return self.mixing == "softmax" and not self.null_source

    def inverse_mean(self, num_sources: int) -> float:
        """What a read is multiplied by so that weights at their start sum `num_sources` sources up."""
        return 2.0 if self.mixing == "sigmoid" else float(num_sources + self.null_source)

    def weights(
        self, query: Tensor, sources: Sequence[Tensor], key_norm: Tensor | None, eps: float
    ) -> tuple[Tensor, list[Tensor]]:
        """(weights [n, ...], or [n, ..., H] for H > 1; the sources that they belong to, cut into heads if need be).

        query: [D], or [D, D] for the input-dependent one; key_norm: [D], None without a norm on keys.
        """
        values = list(sources)
        if self.query == "input":
            newest = formulas.rms_norm(sources[-1], (None, eps))
            # over D: where an optimizer moves every weight by its rate, logits then move as those of a learned query do
            query = F.linear(newest, query.to(newest.dtype)) / self.dim
        if self.heads > 1:
            slices = (self.heads, self.dim // self.heads)
            values = [source.unflatten(-1, slices) for source in sources]
            query = query.unflatten(-1, slices)
            key_norm = None if key_norm is None else key_norm.unflatten(-1, slices)
        if key_norm is None:
            dtype = formulas.statistics_dtype(values[0].dtype)
            logits = torch.stack([(v.to(dtype) * query.to(dtype)).sum(-1) for v in values])
        else:
            logits = formulas.logits(query, values, key_norm, eps)
        if self.temperature != 1.0:
            logits = logits / self.temperature
        if self.mixing == "sigmoid":
            return logits.sigmoid(), values
        if self.null_source:
            return torch.cat([torch.zeros_like(logits[:1]), logits]).softmax(0)[1:], values
        return logits.softmax(0), values

    def flops(self, num_sources: int) -> int:
        """Forward operations per token of a read: what `Residual.read_flops` counts."""
        if num_sources == 1 and self.one_source_is_itself:
            return 0
        if self.mixing == "static":
            return 2 * num_sources * self.dim
        projection = 2 * self.dim**2 if self.query == "input" else 0
        # a weighted sum and a dot product over every source, and a sum of squares for the norm of its key
        return projection + (6 if self.key_normalised else 4) * num_sources * self.dim

    def __str__(self) -> str:
        default = Weighing(self.dim)
        changed = {name: value for name, value in vars(self).items() if value != getattr(default, name)}
        return "".join(f", {name}={value!r}" for name, value in changed.items())
