"""A decoder whose layers a `device_map` has spread over several devices, or offloaded to memory or disk.

accelerate brings a module's weights and inputs together when the module is called. The loop here therefore calls each
norm on its own, where the decoder's hands it to the residual connection, and brings what a layer adds back to the
device of the stream. The residual connection's parameters are brought there too: it is used without a call.
"""

from collections.abc import Callable

from torch import Tensor, nn

from ..model.decoder import Backbone, stream_dtype
from ..model.layers.gqa import Context
from ..residual import State
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
    state = residual.start(stream_dtype(embedding))
    for i, layer in enumerate(model.layers[: model.depth]):  # type: ignore[arg-type]
        if observe is not None and i % 2 == 0:
            observe(state, i)
        h, state = residual.read(state, i)
        state = residual.write(state, i, layer(_apply(layer.norm, h), context).to(device))  # type: ignore[arg-type]
    return _apply(model.norm, residual.finish(state))


def _apply(norm: nn.Module, h: Tensor) -> Tensor:
    if isinstance(norm, nn.Identity):
        return h
    weight = norm.weight
    assert isinstance(weight, Tensor)
    # the weight of an offloaded norm is on the meta device until accelerate fetches it
    return norm(h if weight.is_meta else h.to(weight.device))
