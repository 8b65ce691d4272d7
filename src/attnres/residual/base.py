"""What a residual connection is: how information travels over depth. Four verbs, and a network is a loop over them.

    state = residual.start(embedding)
    for i, layer in enumerate(layers):              # a layer is one attention or one MLP, norm included
        h, state = residual.read(state, i)          # what layer i sees
        state = residual.write(state, i, layer(h))  # what layer i adds
    hidden = residual.finish(state)                 # what the final norm sees

The state is an immutable value, a NamedTuple of tensors and so a pytree. Nothing hides in the module between calls:
that is what lets checkpointing, torch.compile, CUDA graphs and pipeline stages work without special cases.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeGuard, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves

from .. import ops
from ..errors import UsageError, check_counts
from ..ops import Norm
from ..ops.formulas import scaled_norm

State = Any
"""A mechanism's own NamedTuple of tensors."""

M = TypeVar("M", bound=nn.Module)


class Residual(nn.Module, ABC):
    """Base of every mechanism.

    Args:
        dim: width D of the residual stream.
        num_layers: L, where every attention and every MLP is one layer (a Transformer block has two).

    `read` and `finish` take the norm that follows, so that a mechanism can fuse it; the result is then the normalised
    one.
    """

    lean: bool
    """Whether a state keeps only what cannot be computed again from the rest of it. Whoever stores states between
    layers sets it: activation checkpointing, and the hops of a pipeline. A read then does work again that a fuller
    state would have kept, such as phase 1 for the layers ahead; what it returns is the same to rounding."""

    decoder_options: dict[str, Any] = {}
    """Options with which the decoder builds this mechanism unless its config says otherwise."""

    layer_parameters: tuple[str, ...] = ()
    """Names of the parameters whose row i belongs to layer i; a last row beyond the layers is the output read's."""

    first_layer = 0
    """The layer that row 0 of those parameters belongs to: not 0 in a later stage of a pipeline."""

    pre_norm: bool = True
    """Whether every layer and the output head have a norm in front, which `read` and `finish` are given. A mechanism
    that normalises elsewhere, or nowhere, says False: the network then has no such norms."""

    xavier_init = False
    """Whether layers' matrices start with the deviation of Xavier, the root of 2 / (rows + columns), instead of the one
    that the network is configured with."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "reset_parameters" in vars(cls):
            cls.reset_parameters = _on_stacked_rows(cls.reset_parameters)  # type: ignore[method-assign, assignment]

    def __init__(self, dim: int, num_layers: int) -> None:
        super().__init__()
        check_counts(dim=dim, num_layers=num_layers)
        self.dim = dim
        self.num_layers = num_layers
        self.lean = False

    @abstractmethod
    def start(self, embedding: Tensor) -> State:
        """The state before the first layer. embedding: [..., D]."""

    @abstractmethod
    def read(self, state: State, layer: int, norm: nn.Module | None = None) -> tuple[Tensor, State]:
        """What layer `layer` (0-based) sees, [..., D], through `norm` if one is given; and the state to go on with."""

    @abstractmethod
    def write(self, state: State, layer: int, output: Tensor) -> State:
        """The state after layer `layer` added its output [..., D].

        Layers take turns, each writing into the state that its own read returned. A write that has to read first, so
        that it would overwrite or misplace an output, raises UsageError.
        """

    def finish(self, state: State, norm: nn.Module | None = None) -> Tensor:
        """What the output head's norm sees, [..., D], through `norm` if one is given; by default one more read."""
        return self.read(state, self.num_layers, norm)[0]

    def writes_behind_read(self, layer: int) -> bool:
        """Whether a write of `layer` needs the state that its own read returned, because that read moves sums."""
        return False

    @abstractmethod
    def latest(self, state: State) -> Tensor:
        """The tensor that holds the last written output, [..., D]: the stream, the partial sum or the output itself."""

    def tensor_names(self, state: State, layer: int) -> list[str]:
        """Names of the tensors of a lean `state` in front of `layer`, in pytree order.

        A name stands for one value throughout the network: a pipeline stage that holds it need not receive it again.
        Without a mechanism's word on it nothing is shared between layers.
        """
        return [f"{layer}.{i}" for i, leaf in enumerate(tree_leaves(state)) if leaf is not None]

    def row(self, name: str, layer: int) -> Tensor:
        """The row of a parameter of `layer_parameters` that is the layer's (num_layers: the output read's)."""
        return getattr(self, name)[layer - self.first_layer]

    def keep_layers(self, first: int, last: int) -> None:
        """Drops the parameters of all layers but first .. last - 1; with last = num_layers the output read's stay too.

        What stays of a parameter named in `layer_parameters` is its rows, each a parameter of its own: then a layer's
        gradient ends in that layer, which a backward pass in two parts relies on.
        """
        begin, end = first - self.first_layer, (last if last < self.num_layers else last + 1) - self.first_layer
        for name in self.layer_parameters:
            whole = getattr(self, name)
            rows = LayerRows(whole[begin:end], first, len(whole))
            delattr(self, name)
            setattr(self, name, rows)
        self.first_layer = first

    def reset_parameters(self) -> None:
        """Sets every parameter to its value at the start of training; in a stage of a pipeline those of its layers."""

    def init_scale(self, role: str) -> float:
        """Factor on the standard deviation of a layer's initial matrices.

        role: "output" for the last matrix of an attention or MLP, "value" for the others between its input and its
        output, "query_key" for those that only shape attention weights. By default outputs start smaller by the root of
        the number of layers, as in GPT-2, so that their sum has the size of one.
        """
        return self.num_layers**-0.5 if role == "output" else 1.0

    def read_flops(self, layer: int) -> int:
        """Forward floating-point operations per token of the read of `layer` (num_layers: the output read) and of the
        write after it, beyond the plain addition; norms are left out."""
        return 0

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_layers={self.num_layers}"


class LayerRows(nn.Module):
    """Rows of a parameter as parameters named by their layers, read like the parameter itself, which has `count`."""

    def __init__(self, rows: Tensor, first: int, count: int) -> None:
        super().__init__()
        self.count = count
        for layer, row in enumerate(rows, first):
            self.register_parameter(str(layer), nn.Parameter(row.detach().clone(), rows.requires_grad))

    def __getitem__(self, index: int | slice) -> Tensor:
        rows = list(self._parameters.values())
        return torch.stack(rows[index]) if isinstance(index, slice) else rows[index]  # type: ignore


def _on_stacked_rows(reset: Callable[[Any], None]) -> Callable[[Any], None]:
    """`reset` for parameters that may be `LayerRows`: it finds one tensor, and the rows get what it leaves there."""

    @wraps(reset)
    @torch.no_grad()
    def reset_rows(self: Any) -> None:
        modules = dict(self._modules)
        rows = {name: module for name, module in modules.items() if isinstance(module, LayerRows)}
        for name, module in rows.items():
            del self._modules[name]
            self.register_parameter(name, nn.Parameter(module[:], requires_grad=False))
        try:
            reset(self)
        finally:
            for name, module in rows.items():
                for row, value in zip(module.parameters(), self._parameters.pop(name), strict=True):
                    row.copy_(value)
            self._modules = modules

    return reset_rows


def gather(residual: nn.Module) -> None:
    """Before a pass: brings the parameters together that FSDP has sharded as a group of their own.

    FSDP does it when a module is called, and a residual connection's verbs are no call. Raises UsageError unless a
    model around it is sharded and called, at the end of whose backward pass FSDP reduces what gradients are left.
    """
    if hasattr(residual, "unshard"):
        residual.unshard()  # type: ignore[operator]
        if torch.is_grad_enabled() and residual._get_fsdp_state()._is_root is not False:  # type: ignore[operator]
            raise UsageError(
                "fully_shard was applied to the residual connection and not to the model that was called, so nothing "
                "would reduce its gradients; apply it to the whole model last, and call that"
            )


def release(residual: nn.Module) -> None:
    """After a pass without gradients: gives up what `gather` has brought, which a backward pass would do otherwise."""
    if hasattr(residual, "reshard") and not torch.is_grad_enabled():
        residual.reshard()  # type: ignore[operator]


def split_norm(norm: nn.Module | None, dim: int) -> tuple[Norm | None, nn.Module | None]:
    """(what an op can fold in, what is left to call): one of the two is None, both without a norm.

    A plain torch.nn.RMSNorm over the last dimension is folded unless something hangs on its call (`is_plain`).
    """
    if is_plain(norm, nn.RMSNorm) and norm.normalized_shape == (dim,) and norm.eps is not None:
        return (norm.weight, norm.eps), None
    return None, norm


def split_scaled(norm: nn.Module | None, dim: int, scale: float) -> tuple[Norm | None, float, nn.Module | None, float]:
    """(what an op can fold in, the scale that goes with it, what is left to call, the scale in front of that).

    A scale stays with the norm behind it: their product with a read, which may be beyond fp16, is then never made.
    """
    fold, rest = split_norm(norm, dim)
    return (fold, scale, None, 1.0) if rest is None else (None, 1.0, rest, scale)


def normed(h: Tensor, norm: nn.Module | None, scale: float = 1.0) -> Tensor:
    """scale * h [..., D] through the norm, if there is one."""
    fold, rest = split_norm(norm, h.shape[-1])
    if fold is not None:
        return ops.rms_norm(h, scaled_norm(fold, scale))
    if rest is not None and h.dtype == torch.float16 and scale != 1.0:
        # the product may be beyond the range of fp16, though what the norm makes of it is not
        wide = {name: parameter.float() for name, parameter in rest.named_parameters()}
        return functional_call(rest, wide, (h.float() * scale,)).to(h.dtype)
    h = h if scale == 1.0 else h * scale
    return h if rest is None else rest(h)


def is_plain(module: nn.Module | None, kind: type[M]) -> TypeGuard[M]:
    """Whether a call of the module does what its class `kind` does and nothing more, so that nobody misses the call.

    A subclass, a forward of its own (accelerate's, adapters', tensor parallelism's) and any hook say no.
    """
    return type(module) is kind and "forward" not in vars(module) and not _hooked(module)


def _hooked(module: nn.Module) -> bool:
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks)


def check_turn(in_turn: bool, verb: str, layer: int) -> None:
    """Raises UsageError if it is not the turn of `layer` to "read" or "write"."""
    if not in_turn:
        mend = f"go on with the state that read(state, {layer}) returns, and write into that"
        if verb == "read":
            mend = "read layers in their order, each after the one before has written"
        raise UsageError(f"layer {layer} may not {verb} now: {mend}")
