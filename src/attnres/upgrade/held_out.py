"""The loss on rows that training never sees, row by row."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F
from torch.utils.data import default_collate

from ..errors import Failure
from ..run import hardware
from .rows import IGNORED, Rows


class Losses(NamedTuple):
    """Of each row: the sum over its scored tokens, in nats, and their number."""

    sums: list[float]
    counts: list[int]

    @property
    def mean(self) -> float:
        """Nats per scored token."""
        return sum(self.sums) / sum(self.counts)


@torch.no_grad()
def losses(model: Any, rows: Rows, batch_size: int, device: torch.device, precision: torch.dtype) -> Losses:
    """The losses of a model, which is in evaluation mode meanwhile, under autocast. Raises Failure if
    they are not finite."""
    found = Losses([], [])
    was_training = model.training
    model.eval()
    for at in range(0, len(rows), batch_size):
        batch = default_collate([rows[i] for i in range(at, min(at + batch_size, len(rows)))])
        labels = batch.pop("labels")
        inputs = {name: tensor.to(device) for name, tensor in batch.items()}
        with hardware.autocast(device, precision):
            logits = model(**inputs, use_cache=False).logits
        for row, wanted in zip(logits[:, :-1], labels[:, 1:], strict=True):
            wanted = wanted.to(row.device)
            found.sums.append(F.cross_entropy(row.float(), wanted, ignore_index=IGNORED, reduction="sum").item())
            found.counts.append(int((wanted != IGNORED).sum()))
    model.train(was_training)
    if not math.isfinite(found.mean):
        raise Failure(f"the held-out loss is {found.mean}; lower --lr, or give --precision float32")
    return found
