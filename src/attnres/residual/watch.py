"""A switch for finding layers that change tensors which the residual connection keeps.

A plain sum does not mind a layer that writes its output into one buffer again and again, or changes its input in place.
Depth attention keeps outputs for later layers to read, and some reads hand out a kept tensor itself. PyTorch counts the
in-place changes of every tensor's memory; a kept tensor whose count has risen was changed by a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from ..errors import UsageError
from .base import Residual


@contextmanager
def watched(residual: Residual) -> Iterator[None]:
    """Within, `read`, `write`, `latest` and `finish` raise UsageError if a tensor of the state they are given was
    changed in place since the residual connection gave it out; the message names the layer.

    For debugging, eagerly: not under torch.compile, nor in torch.inference_mode, where nothing is counted. What writes
    to memory behind PyTorch's back (`.data`, NumPy, kernels of one's own) is not noticed.
    """
    counts = WeakTensorKeyDictionary()

    def check(state: Any, where: str) -> None:
        for tensor in _tensors(state):
            before = counts.setdefault(tensor, tensor._version)
            if tensor._version != before:
                raise UsageError(
                    f"a tensor {list(tensor.shape)} that later layers read was changed in place before {where}; let "
                    "layers return new tensors, and change neither their input nor an earlier output"
                )

    def checked(verb: Callable[..., Any], name: str) -> Callable[..., Any]:
        @wraps(verb)
        def call(state: Any, *args: Any, **kwargs: Any) -> Any:
            layer = f"the {name} of layer {args[0]}" if name in ("read", "write") and args else f"`{name}`"
            check(state, layer)
            result = verb(state, *args, **kwargs)
            after = result[1] if name == "read" else result if name == "write" else ()
            for tensor in _tensors(after):
                counts.setdefault(tensor, tensor._version)
            return result

        return call

    names = [name for name in ("read", "write", "latest", "finish") if name not in vars(residual)]
    with standing_in(residual, **{name: checked(getattr(residual, name), name) for name in names}):
        yield


@contextmanager
def standing_in(module: nn.Module, **methods: Callable[..., Any]) -> Iterator[None]:
    """Within, these stand in the place of the module's own methods, also for the loops of others, such as that of
    transformers over converted layers."""
    try:
        vars(module).update(methods)
        yield
    finally:
        for name in methods:
            vars(module).pop(name, None)


def _tensors(state: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(state) if isinstance(leaf, Tensor) and not leaf.is_inference()]
