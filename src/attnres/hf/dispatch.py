"""A decoder whose layers a `device_map` has spread over several devices, or offloaded to memory or disk.

accelerate brings a module's weights and inputs together when the module is called. The loop here therefore calls each
norm on its own, where the decoder's hands it to the residual connection, and brings what a layer adds back to the
device of the stream. The residual connection's parameters are read without a call, so they must stay on that device.
"""

from collections.abc import Callable

from torch import Tensor, nn

from ..errors import UsageError
from ..model.attention import Context
from ..model.decoder import Backbone, stream_dtype
from ..residual import State


def is_dispatched(model: Backbone) -> bool:
    """Whether accelerate moves weights or inputs of single layers of the model."""
    return any("_hf_hook" in vars(module) for layer in model.layers for module in (layer, layer.norm))


def hidden_across_devices(
    model: Backbone, embedding: Tensor, context: Context, observe: Callable[[State, int], None] | None = None
) -> Tensor:
    """`Backbone.hidden` for a model that accelerate has dispatched, without gradient checkpointing.

    Raises UsageError if the residual connection is not on one device with the embedding's output.
    """
    device = embedding.device
    if any(p.device != device for p in model.residual.parameters()):
        raise UsageError(f"the device_map must keep the residual connection with the embedding; put it on {device}")
    state = model.residual.start(stream_dtype(embedding))
    for i, layer in enumerate(model.layers[: model.depth]):  # type: ignore[arg-type]
        if observe is not None and i % 2 == 0:
            observe(state, i)
        h, state = model.residual.read(state, i)
        state = model.residual.write(state, i, layer(_apply(layer.norm, h), context).to(device))  # type: ignore[arg-type]
    return _apply(model.norm, model.residual.finish(state))


def _apply(norm: nn.Module, h: Tensor) -> Tensor:
    if isinstance(norm, nn.Identity):
        return h
    weight = norm.weight
    assert isinstance(weight, Tensor)
    # the weight of an offloaded norm is on the meta device until accelerate fetches it
    return norm(h if weight.is_meta else h.to(weight.device))
