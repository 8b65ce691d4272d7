"""transformers' gradient checkpointing of converted layers: which form of it they take."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from torch import nn

from ...errors import UsageError


def non_reentrant(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, torch's checkpoint with or without options, in its non-reentrant form.

    Raises UsageError if its options ask for the reentrant one, which finds no gradients in what converted layers hand
    on, since that is no tensor.
    """
    chosen = getattr(function, "keywords", {}).get("use_reentrant")
    if chosen:
        raise UsageError(
            "converted models checkpoint with gradient_checkpointing_kwargs={'use_reentrant': False} only; "
            "the reentrant form loses the gradients of what layers hand on"
        )
    return partial(function, use_reentrant=False) if chosen is None else function


def check_checkpointing(layers: Iterable[nn.Module]) -> None:
    """Raises UsageError if decoder layers that are to be converted checkpoint in the reentrant form."""
    for layer in layers:
        if getattr(layer, "gradient_checkpointing", False):
            non_reentrant(layer._gradient_checkpointing_func)  # type: ignore[arg-type]
