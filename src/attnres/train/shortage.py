"""Running out of memory, told in one sentence: what was asked for, and what to lower."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from ..errors import Failure, UsageError
from ..run import hardware
from ..run.config import TrainConfig

_REFUSED = re.compile(
    r"out of memory|not enough memory|can't allocate memory|ALLOC_FAILED|Unable to allocate", re.IGNORECASE
)
_SIZE = re.compile(r"(?:tried to|Unable to) allocate (\d+ bytes|[\d.]+ ?[KMGTPE]?i?B)", re.IGNORECASE)


@contextmanager
def telling_shortage(told: Callable[[str], str]) -> Iterator[None]:
    """A context in which running out of memory is a Failure.

    told: the sentence; it is given what was asked for, such as " (asked for 2.00 GiB)", empty where nobody has said.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if (asked := asked_for(error)) is None:
            raise
        raise Failure(told(asked)) from error


def check_size(config: TrainConfig) -> None:
    """Raises UsageError, before anything is allocated, for a run that cannot fit the memory of this machine's device.

    Counted is what no setting avoids: weights, gradients and one of the optimizer's moments in fp32, the same share of
    them in each process of a split, and the logits of a batch.
    """
    device = hardware.find_device(config.device)
    if (there := hardware.memory(device)) is None:
        return
    split = config.parallel
    parameters, shares = config.model.parameter_counts()["total"], split.shard * split.ep * split.tp * split.pp
    if (needed := 12 * parameters // shares) > there:
        raise UsageError(
            model_too_large(f" ({parameters:,} parameters take {_gb(needed)}, and there are {_gb(there)})")
        )
    rows = config.batch_size // (split.dp * split.shard * split.microbatch_count)
    if (needed := 4 * rows * config.context * config.model.vocab_size // split.tp) > there:
        raise UsageError(
            f"the logits of {config.batch_size:,} sequences of {config.context:,} tokens take {_gb(needed)}, and there "
            f"are {_gb(there)}; lower --batch-size (a larger --accumulate keeps a step's tokens) or --context"
        )


def _gb(size: int) -> str:
    return f"{size / 1e9:,.1f} GB"


def model_too_large(asked: str) -> str:
    """What to say where a model with its optimizer finds no place."""
    return (
        f"the model and its optimizer do not fit memory{asked}; make it smaller with --preset, --model.hidden-size "
        "or --model.num-hidden-layers, or shard it over processes (attnres plan says what a split takes)"
    )


def asked_for(error: BaseException | None) -> str | None:
    """ " (asked for SIZE)" of an error that says memory was refused, empty if it names no size; None for others."""
    while error is not None:
        text = str(error)
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or (
            isinstance(error, RuntimeError) and _REFUSED.search(text)
        ):
            size = _SIZE.search(text)
            return f" (asked for {_readable(size[1])})" if size else ""
        error = error.__cause__  # a pipeline stage says only which of its passes failed
    return None


def _readable(size: str) -> str:
    count, _, unit = size.partition(" ")
    return f"{int(count) / 2**30:,.2f} GiB" if unit == "bytes" else size
