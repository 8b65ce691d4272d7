"""A decoder whose layers a `device_map` has spread over several devices, or offloaded to memory or disk.

accelerate brings a module's weights and inputs together when the module is called. A pass here therefore calls each
norm on its own, where the decoder's hands it to the residual connection, and brings what a layer adds back to the
device of the stream. The residual connection's parameters are brought there too: it is used without a call.
"""

from collections.abc import Callable

from torch import Tensor, nn

from ..model.decoder import Backbone, stream_dtype
from ..model.layers.gqa import Context
from ..model.loop import input_norm, run
from ..residual.base import State
from .residual_place import rows_on


def is_dispatched(model: Backbone) -> bool:
    """Whether accelerate moves weights or inputs of single layers of the model."""
    return any("_hf_hook" in vars(module) for layer in model.layers for module in (layer, layer.norm))


def hidden_across_devices(
    model: Backbone, embedding: Tensor, context: Context, observe: Callable[[State, int], None] | None = None
) -> Tensor:
    """`Backbone.hidden` for a model that accelerate has dispatched, without gradient checkpointing."""
    device = embedding.device
    residual = rows_on(model.residual, device)

    def call(layer: nn.Module, h: Tensor) -> Tensor:
        return layer(_apply(input_norm(layer), h), context).to(device)

    state = residual.start(stream_dtype(embedding))
    state = run(residual, model.layers, state, 0, model.depth, call=call, observe=observe)
    return _apply(model.norm, residual.finish(state))


def _apply(norm: nn.Module, h: Tensor) -> Tensor:
    if isinstance(norm, nn.Identity):
        return h
    weight = norm.weight
    assert isinstance(weight, Tensor)
    # the weight of an offloaded norm is on the meta device until accelerate fetches it
    return norm(h if weight.is_meta else h.to(weight.device))
