"""mHC-lite: doubly stochastic mixing as a weighted mean of all permutations of the streams (arXiv 2601.05732).

    M = sum_k a_k P_k,    a = softmax(a_res x^ W_res + b_res) in R^{n!}

By Birkhoff and von Neumann every doubly stochastic matrix has this form, so there is nothing to iterate and rows and
columns sum to one exactly. pre, post and x^ are those of mHC. n! weights: 24 for four streams, 120 for five.
"""

from __future__ import annotations

import math
from itertools import permutations

import torch
from torch import Tensor

from ...errors import UsageError
from ..registry import register
from .mhc import OFF_DIAGONAL, GatedStreams

MAX_STREAMS = 5


@register("mhc_lite")
class MHCLite(GatedStreams):
    """mHC-lite.

    Args:
        dim: width D.
        num_layers: L; every attention and every MLP is one layer.
        num_streams: n, how many residual streams there are; in mHC-lite at most 5.

    Parameters (row i = layer i), in the order pre, post, res:
        projection [L, 2 n + n!, n D]: phi and W_res, zeros at init.
        bias [L, 2 n + n!]: b; pre and post 1 at stream i mod n and -1 elsewhere, res 0 for the identity and -8 for the
            other permutations, which come in lexicographic order.
        gate [L, 3]: a, 0.01 at init.

    Raises UsageError for less than one stream or more than five.
    """

    def __init__(self, dim: int, num_layers: int, *, num_streams: int = 4) -> None:
        if isinstance(num_streams, int) and num_streams > MAX_STREAMS:
            raise UsageError(
                f"num_streams must be at most {MAX_STREAMS} in mhc_lite, which weighs all permutations of the streams; "
                f"it is {num_streams}; use mhc for more"
            )
        logits = math.factorial(num_streams) if isinstance(num_streams, int) and num_streams > 0 else 0
        super().__init__(dim, num_layers, num_streams, logits)

    def initial_logits(self) -> Tensor:
        logits = torch.full((self.num_logits,), OFF_DIAGONAL)
        logits[0] = 0
        return logits

    def mixing(self, logits: Tensor) -> Tensor:
        n, device = self.num_streams, logits.device
        orders = torch.tensor(list(permutations(range(n))), device=device)
        matrices = (orders.unsqueeze(-1) == torch.arange(n, device=device)).flatten(1).to(logits.dtype)
        with torch.autocast(device.type, enabled=False):
            return (logits.softmax(-1) @ matrices).unflatten(-1, (n, n))
