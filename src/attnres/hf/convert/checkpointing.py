"""transformers' gradient checkpointing of converted layers: which form of it they take."""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

from ...errors import UsageError

_log = logging.getLogger("attnres")


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


def made_non_reentrant(function: Callable[..., Any]) -> Callable[..., Any]:
    """The non-reentrant form of `function`, which was chosen before the conversion, for layers that took any."""
    options = getattr(function, "keywords", {})
    if not options.get("use_reentrant"):
        return function
    _log.warning("gradient checkpointing was on in its reentrant form; the converted model does it in the other one")
    return partial(function.func, *function.args, **{**options, "use_reentrant": False})  # type: ignore[attr-defined]
