"""What an optimizer is to know of an Attention Residuals model: queries do not decay, and may have their own rate."""

import sys
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import trainer_pt_utils

from ..errors import UsageError
from ..residual.base import Residual


def parameter_groups(
    model: nn.Module, lr: float, weight_decay: float, query_lr: float | None = None
) -> list[dict[str, Any]]:
    """The trainable parameters of a model in groups for an optimizer of torch.optim, each parameter once.

    Weight decay is for matrices alone: neither norms and biases nor anything that a residual connection owns decays,
    for a query that shrinks goes back to the plain sum.

    Args:
        model: native or converted, with adapters or without.
        lr, weight_decay: the learning rate, and the decay of matrices.
        query_lr: learning rate of the residual connection's parameters; None for `lr`.

    Raises UsageError for numbers below zero, and if nothing is trainable.
    """
    query_lr = lr if query_lr is None else query_lr
    for name, value in (("lr", lr), ("weight_decay", weight_decay), ("query_lr", query_lr)):
        if not value >= 0:
            raise UsageError(f"{name} must be zero or positive; it is {value}")
    residual = residual_parameters(model)
    members: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            own = parameter in residual
            decay = 0.0 if own or parameter.dim() < 2 else weight_decay
            members.setdefault((query_lr if own else lr, decay), []).append(parameter)
    if not members:
        raise UsageError("model has no trainable parameters; set requires_grad on those that should learn")
    return [{"params": p, "lr": rate, "weight_decay": decay} for (rate, decay), p in members.items()]


def residual_parameters(model: nn.Module) -> set[nn.Parameter]:
    """What the residual connections of a model own, native or converted."""
    return {p for module in model.modules() if isinstance(module, Residual) for p in module.parameters()}


def spare_residuals() -> None:
    """Has transformers' Trainer give the parameters of residual connections no weight decay, as it does with norms."""
    found: Callable[..., list[str]] = trainer_pt_utils.get_parameter_names
    spared = getattr(found, "spared", ())
    if Residual in spared:
        return

    def get_parameter_names(model: Any, forbidden_layer_types: Any, *args: Any, **kwargs: Any) -> list[str]:
        return found(model, [*forbidden_layer_types, Residual], *args, **kwargs)

    get_parameter_names.spared = (*spared, Residual)  # type: ignore[attr-defined]
    for name in ("transformers.trainer_pt_utils", "transformers.trainer"):
        if name in sys.modules:  # the second has its own name for it
            sys.modules[name].get_parameter_names = get_parameter_names  # type: ignore[attr-defined]
