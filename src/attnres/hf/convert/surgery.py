"""The converted decoder layer: the state of the residual connection travels where hidden states used to.

transformers' own loop over decoder layers stays as it is, and with it masks, caches, positions, generation and
checkpointing. The first layer gets the embedding and starts the state, every layer reads and writes it, and the last
layer finishes it for the final norm.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.utils.checkpoint
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ...errors import UsageError
from ...model.loop import run
from ...model.token_shards import TokenShards
from ...residual.base import Residual, State, gather, release
from ...residual.depth_attention import DepthAttention
from ..packing import STATEFUL
from ..residual_place import rows_on
from ..tensor_parallel import shards_of
from .checkpointing import made_non_reentrant, non_reentrant
from .layer_sum import first_of
from .packing import ENDS, in_pieces
from .table import Architecture, layers_of

_CACHE = {"past_key_values": "cache_params"}
"""What linear attention calls the cache."""
CHECKPOINTING = ("_gradient_checkpointing_func", "gradient_checkpointing")
"""What transformers writes into a decoder layer to have it checkpoint."""

F = TypeVar("F", bound=Callable[..., Any])


def once_a_class(function: F) -> F:
    """functools.cache with the function's own signature: as mypy sees it, classes of transformers cannot be hashed."""
    return functools.cache(function)  # type: ignore[return-value]


@dataclass(frozen=True)
class DepthStream:
    """What decoder layers hand on: the residual connection's state, and the index of the layer that reads it next.

    Not a tuple, because transformers takes the first element of a tuple for the hidden states; a pytree, so that
    checkpointing and sharding find the tensors.
    """

    state: State
    layer: int
    shards: TokenShards | None = None
    """Where the state's tokens lie under tensor parallelism; None: here."""

    @property
    def device(self) -> torch.device:
        return pytree.tree_leaves(self.state)[0].device

    def to(self, *args: Any, **kwargs: Any) -> "DepthStream":
        """The stream on another device: device maps move a layer's inputs with it."""
        state = pytree.tree_map_only(Tensor, lambda t: t.to(*args, **kwargs), self.state)
        return DepthStream(state, self.layer, self.shards)

    def hidden_states(self, residual: Residual) -> Tensor:
        """What the next layer sees, before its norm, [B, T, D]."""
        h = rows_on(residual, self.device).read(self.state, self.layer)[0]
        return h if self.shards is None else self.shards.gather(h)


pytree.register_pytree_node(
    DepthStream,
    lambda stream: ([stream.state], (stream.layer, stream.shards)),
    lambda children, place: DepthStream(next(iter(children)), *place),
    serialized_type_name="attnres.hf.DepthStream",
    to_dumpable_context=lambda place: place[0],  # no process group can be dumped
    from_dumpable_context=lambda layer: (layer, None),
)


@dataclass(frozen=True)
class Owner:
    """A layer's way to the base model that it is part of, which as a plain attribute would become its submodule."""

    model: Any

    def __deepcopy__(self, memo: dict[int, Any]) -> "Owner":
        # a copied model has copied layers; a layer that is copied alone stays with its model
        return Owner(memo.get(id(self.model), self.model))


class ConvertedLayer(nn.Module):
    """Comes before the original class in a converted decoder layer's bases and replaces its forward."""

    original: type[nn.Module]
    architecture: Architecture
    argument_names: tuple[str, ...]
    """Of the original forward, after the hidden states."""
    first: int
    """This layer's attention among all layers of the residual connection; its MLP is the one after."""
    renamed: dict[str, str]
    """What attention calls an argument that it knows by another name."""
    withheld: frozenset[str]
    """Arguments of the original forward that attention must not be given."""
    known: frozenset[str] | None
    """All that attention takes; None where it takes any."""
    recurrent: bool
    """Whether what stands in attention's place carries a state from token to token, which no mask stops."""
    owner: Owner
    recomputed = False
    _compiled_sublayer: Callable[..., Tensor] | None = None
    """What `compile` makes of `_sublayer`."""
    checkpoint: Callable[..., Any] = staticmethod(torch.utils.checkpoint.checkpoint)

    # what transformers sets, from this model or from one around it that knows nothing of conversions
    @property
    def gradient_checkpointing(self) -> bool:
        """Whether the layer is computed again in the backward pass."""
        return self.recomputed

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, enabled: bool) -> None:
        self.recomputed = enabled
        lean = any(layer.gradient_checkpointing for layer in layers_of(self.owner.model, [self.architecture]))
        for module in self.owner.model.modules():
            if isinstance(module, Residual):
                module.lean = lean

    @property
    def _gradient_checkpointing_func(self) -> Callable[..., Any]:
        return self.checkpoint

    @_gradient_checkpointing_func.setter
    def _gradient_checkpointing_func(self, function: Callable[..., Any]) -> None:
        self.checkpoint = non_reentrant(function)

    def __reduce__(self) -> tuple[Any, ...]:
        return _new_layer, (type(self).original, self.architecture), self.__getstate__()

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compiles both sublayers with torch.compile, which takes the arguments, for all layers of a kind once.

        Not what stands between them: each layer reads another number of sources, and would be compiled anew for it.
        """
        self._compiled_sublayer = torch.compile(self._sublayer, *args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__getstate__().items() if name != "_compiled_sublayer"}

    def forward(self, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        stream = self._through(hidden_states, *args, **kwargs)
        outputs = self.architecture.outputs
        return (stream, *[None] * (outputs - 1)) if outputs else stream

    def _through(self, hidden_states: Any, *args: Any, **kwargs: Any) -> DepthStream | Tensor:
        entry, attention, mlp = self.architecture, self.first, self.first + 1
        residual = residual_of(self)
        # a config says less than there are while self-speculation drafts
        count = min(2 * self.owner.model.config.num_hidden_layers, residual.num_layers)
        if attention >= count:
            return hidden_states  # not all of transformers' loops stop there
        kwargs.update(zip(self.argument_names, args, strict=False))
        for name in entry.refused_arguments:
            if kwargs.pop(name, None) is not None:
                raise UsageError(f"{name} must be None: this {entry.model_type!r} model has no layers that take it")
        residual = rows_on(residual, hidden_states.device)
        if self.first == 0:
            gather(residual)
        ends = kwargs.pop(ENDS, None)
        state, shards = self._state(residual, hidden_states)
        if entry.parallel:
            state = self._parallel(residual, state, shards, kwargs, ends)
        else:
            sublayers: dict[int, Callable[[Tensor], Tensor]] = {
                attention: lambda h: self._attend(h, shards, kwargs, ends),
                mlp: lambda h: self._feed_forward(h, shards),
            }
            state = run(residual, sublayers, state, attention, mlp + 1, call=lambda sublayer, h: sublayer(h))
        if mlp + 1 < count:
            return DepthStream(state, mlp + 1, shards)
        h = residual.finish(state)
        release(residual)
        return h if shards is None else shards.gather(h)

    def _parallel(
        self,
        residual: Residual,
        state: State,
        shards: TokenShards | None,
        arguments: dict[str, Any],
        ends: Tensor | None,
    ) -> State:
        """Both sublayers read the state before either has written, each with its own query if it reads depth."""
        attention, mlp = self.first, self.first + 1
        own = not isinstance(residual, DepthAttention) or residual.reads_depth(mlp)
        h_mlp = residual.read(state, mlp)[0] if own else None
        h, state = residual.read(state, attention)
        state = residual.write(state, attention, self._attend(h, shards, arguments, ends))
        if residual.writes_behind_read(mlp):
            state = residual.read(state, mlp)[1]  # for the state alone
        h_mlp = h if h_mlp is None else h_mlp
        return residual.write(state, mlp, self._feed_forward(h_mlp, shards))

    def _state(self, residual: Residual, hidden_states: Any) -> tuple[State, TokenShards | None]:
        if isinstance(hidden_states, DepthStream):
            if hidden_states.layer != self.first:
                raise UsageError(
                    f"decoder layer {self.first // 2} gets what is meant for layer {hidden_states.layer // 2}; the "
                    f"layers of a converted model can neither be removed nor reordered: do that before the conversion"
                )
            return hidden_states.state, hidden_states.shards
        if self.first:
            raise UsageError(
                "only the first decoder layer takes hidden states; later ones take the output of the one before, also "
                "from another stage of a pipeline"
            )
        shards = shards_of(self.owner.model, hidden_states.shape[1])
        return residual.start(hidden_states if shards is None else shards.own(hidden_states)), shards

    def _attend(self, h: Tensor, shards: TokenShards | None, arguments: dict[str, Any], ends: Tensor | None) -> Tensor:
        entry, known = self.architecture, self.known
        if self.renamed:
            arguments = {self.renamed.get(name, name): value for name, value in arguments.items()}
        if self.withheld or known is not None:
            arguments = {
                name: value
                for name, value in arguments.items()
                if name not in self.withheld and (known is None or name in known)
            }
        run = self._sublayer if self._compiled_sublayer is None else self._compiled_sublayer
        ends = ends if self.recurrent else None  # elsewhere a mask keeps sequences apart
        return run(h, shards, entry.attention_norm, entry.attention, entry.after_attention, arguments, ends)

    def _feed_forward(self, h: Tensor, shards: TokenShards | None) -> Tensor:
        entry = self.architecture
        run = self._sublayer if self._compiled_sublayer is None else self._compiled_sublayer
        return run(h, shards, entry.mlp_norm, entry.mlp, entry.after_mlp, {}, beside=entry.beside_mlp)

    def _sublayer(
        self,
        h: Tensor,
        shards: TokenShards | None,
        norm: str | None,
        name: str,
        after: tuple[str, ...],
        arguments: dict[str, Any],
        ends: Tensor | None = None,
        beside: str | None = None,
    ) -> Tensor:
        """What one sublayer adds to the stream that it reads as `h`; with `ends`, for each sequence on its own."""
        x = h if norm is None else getattr(self, norm)(h)
        x = x if shards is None else shards.gather(x)
        output = self._output(name, x, shards, arguments, ends)
        for module in after:
            output = getattr(self, module)(output)
        if beside is not None:
            output = output + self._output(beside, x, shards, {}, None)
        if self.architecture.multiplier is not None:
            output = output * getattr(self, self.architecture.multiplier)
        # under autocast sublayers answer in half precision while the stream, as in the original, stays in its own
        return output.to(h.dtype)

    def _output(
        self, name: str, x: Tensor, shards: TokenShards | None, arguments: dict[str, Any], ends: Tensor | None
    ) -> Tensor:
        sublayer: nn.Module = getattr(self, name)
        if name in self.architecture.adds_itself:
            arguments = {**arguments, "residual": torch.zeros_like(x)}
        output: Tensor = first_of(sublayer(x, **arguments) if ends is None else in_pieces(sublayer, x, ends, arguments))
        output = output if output.shape[:-1] == x.shape[:-1] else output.view(*x.shape[:-1], -1)  # some answer in rows
        return output if shards is None else shards.take(sublayer, output)


@once_a_class
def converted_layer_class(original: type[nn.Module], entry: Architecture) -> type[nn.Module]:
    """The converted form of a decoder layer class. It keeps the name, by which wrapping policies and device maps go."""
    names = tuple(inspect.signature(original.forward).parameters)[2:]
    body: dict[str, Any] = {"original": original, "architecture": entry, "argument_names": names}
    body |= {"__module__": __name__, "__doc__": ConvertedLayer.__doc__}
    return type(original.__name__, (ConvertedLayer, original), body)


def _new_layer(original: type[nn.Module], entry: Architecture) -> nn.Module:
    """A layer for pickle to fill: its class is made when needed, so pickle cannot find it by its name."""
    converted = converted_layer_class(original, entry)
    return converted.__new__(converted)


def attach(base: Any, residual: Residual, entries: Sequence[Architecture]) -> None:
    """Gives a base model the residual connection, and its decoder layers, each with its entry, their new forward."""
    base.residual, base.place_of_layers = residual, entries[0].layers
    layers: Any = layers_of(base, entries)
    kinds = getattr(base.config, "layer_types", None) or [None] * len(layers)
    for i, (layer, entry) in enumerate(zip(layers, entries, strict=True)):
        layer.__class__ = converted_layer_class(type(layer), entry)
        layer.first = 2 * i
        parameters = inspect.signature(type(getattr(layer, entry.attention)).forward).parameters
        linear = "cache_params" in parameters
        layer.renamed = dict(entry.renamed) | (_CACHE if linear else {})
        # softmax attention heeds what linear attention must not be told
        layer.withheld = frozenset(layer.argument_names) - frozenset(parameters) if linear else frozenset()
        any_names = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        layer.known = None if any_names else frozenset(parameters)
        layer.recurrent = kinds[i] in STATEFUL
        layer.owner = Owner(base)
    for layer in layers:
        settings = {name: vars(layer).pop(name) for name in CHECKPOINTING if name in vars(layer)}
        for name, value in settings.items():
            setattr(layer, name, made_non_reentrant(value) if callable(value) else value)


def converted_layers(base: Any) -> list[ConvertedLayer]:
    """The decoder layers of a converted base model, in their order; a stage of a pipeline has some of them."""
    return [layer for layer in base.get_submodule(base.place_of_layers) if isinstance(layer, ConvertedLayer)]


def check_whole(base: Any) -> None:
    """Raises UsageError if a converted base model has no longer the layers that its residual connection is made for."""
    found, made_for = len(base.get_submodule(base.place_of_layers)), base.residual.num_layers // 2
    if found != made_for:
        raise UsageError(
            f"the model has {found} decoder layers and a residual connection for {made_for}; the layers of a converted "
            f"model can neither be removed nor added: do that before the conversion"
        )


def residual_of(module: Any) -> Residual:
    # looked up at each call: adapters put a trainable copy in the residual connection's place
    return module.owner.model.residual
