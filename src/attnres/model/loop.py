"""The loop over a residual connection, the only one: what a layer sees is read, and what it adds is written."""

from collections.abc import Callable
from typing import Protocol, TypeVar

from torch import Tensor, nn

from ..residual.base import Residual, State

L = TypeVar("L")
L_co = TypeVar("L_co", covariant=True)


class Layers(Protocol[L_co]):
    """Anything in which an index finds a layer: a list, a ModuleList, a dict of some."""

    def __getitem__(self, index: int, /) -> L_co: ...


def input_norm(layer: nn.Module) -> nn.Module:
    """The norm in front of a layer, for `read` to fold in."""
    return layer.norm  # type: ignore[return-value]


def no_norm(layer: object) -> None:
    """For layers that are called with what stands before their norm, or have none."""


def run(
    residual: Residual,
    layers: Layers[L],
    state: State,
    first: int,
    last: int,
    *,
    call: Callable[[L, Tensor], Tensor],
    norm: Callable[[L], nn.Module | None] = no_norm,
    observe: Callable[[State, int], None] | None = None,
) -> State:
    """The state after the layers first .. last - 1, from the state in front of them.

    Args:
        call: what a layer adds, [..., D], for what it sees, [..., D].
        norm: the norm through which a layer sees it, or None.
        observe: called with the state in front of every layer and the layer's index.
    """
    for i in range(first, last):
        if observe is not None:
            observe(state, i)
        x, state = residual.read(state, i, norm(layers[i]))
        state = residual.write(state, i, call(layers[i], x))
    return state
