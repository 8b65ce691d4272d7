"""The residual connection of a model that accelerate has spread over devices, or peft has wrapped.

Both act when a module is called, and a residual connection is not: layers use its verbs.
"""

import copy
from typing import Any

import torch

from ..errors import UsageError
from ..residual.base import Residual


def check_verbs(residual: Any) -> None:
    """Raises UsageError if something without a residual connection's verbs stands in its place."""
    if not hasattr(residual, "read"):
        raise UsageError(
            f"the residual connection is inside a {type(residual).__name__}, which changes its parameters where it is "
            f"called, and it never is; leave it out of target_parameters and give modules_to_save=['residual']"
        )


def rows_on(residual: Residual, device: torch.device) -> Residual:
    """`residual` with its parameters on `device`: a device map may have put it elsewhere, or offloaded it."""
    if all(parameter.device == device for parameter in residual.parameters()):
        return residual
    return _on(residual, device)


def _on(module: Any, device: torch.device) -> Any:
    # accelerate loads offloaded weights for a module's forward alone, so they are taken from where it keeps them
    stored = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
    moved = copy.copy(module)
    moved._parameters = {
        name: p if p is None else (stored[name] if stored and p.is_meta else p).to(device)
        for name, p in module._parameters.items()
    }
    moved._modules = {name: _on(child, device) for name, child in module._modules.items()}
    return moved
