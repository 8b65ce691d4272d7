"""Tensor parallelism: every matrix is split over the processes of the mesh's tp dimension, and the residual stream is
split along the sequence.

The residual connection and all norms work on plain tensors [B, T / tp, D], a process's own tokens. A layer gathers all
T tokens of its input, computes with its share of the heads or of the inner width, and the sum over the processes is
scattered back to tokens (sequence parallelism, arXiv 2205.05198, section 4.2). So what a mechanism keeps of earlier
layers is split too, and reading over depth needs no communication.

Layers run on plain tensors with a process's own part of each split parameter (`Layer.split`), as if they were smaller:
heads of attention, the inner width of an MLP and of every expert. What they do not split, such as latents and routing,
every process computes for all tokens, and its gradient is what follows from this process's share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)

from ..errors import UsageError
from ..model.layer import Layer, layers_of
from ..model.layers.gqa import Context
from ..model.layers.linear import bare_weight

TOKENS = Shard(1)


def split_parameters(layer: Layer) -> Iterator[tuple[nn.Module, str, int]]:
    """Module and name of every parameter of a layer that is split, and along which dimension.

    Raises UsageError for a matrix with something in its layer's place: it would stay whole, and its output be added up
    once a process; and for a kind of layer that does not say how it is split.
    """
    if not layer.split:
        raise UsageError(f"{type(layer).__name__} layers say nothing of tensor parallelism; give them a `split`")
    for path, dim in layer.split.items():
        owner, _, name = path.rpartition(".")
        module = layer.get_submodule(owner)
        if owner and bare_weight(module) is None:
            raise UsageError(
                f"{owner} must be a plain torch.nn.Linear to be split over processes; it is a "
                f"{type(module).__name__}: merge adapters and take weights that are not quantised"
            )
        yield module, name, dim


def apply(module: nn.Module, mesh: DeviceMesh) -> None:
    """Splits the matrices of `module` over the 1-D `mesh`, in place.

    The module is a decoder or a part of one: it may have `layers`, `embed_tokens` and `lm_head`. It then takes token
    ids [B, T], equal on all processes, or states of T / tp tokens; and returns states of T / tp tokens, or all the
    logits [B, T, V] on every process. Its weights must be equal on all processes. Rows of the vocabulary need not
    divide by tp. After the backward pass `reduce_replicated_gradients` must follow.
    """
    for layer in layers_of(module):
        split_layer(layer, mesh, TOKENS)
        layer.register_forward_hook(_as_own_tensor)
    embedding, head = getattr(module, "embed_tokens", None), getattr(module, "lm_head", None)
    tied = embedding is not None and head is not None and head.weight is embedding.weight
    ends: dict[str, ParallelStyle] = {}
    if embedding is not None:
        ends["embed_tokens"] = RowwiseParallel(input_layouts=Replicate(), output_layouts=TOKENS)
    if head is not None:
        ends["lm_head"] = ColwiseParallel(input_layouts=TOKENS, output_layouts=Replicate())
    _split(module, mesh, ends)
    for end in (embedding, head):
        if end is not None:
            end.register_forward_hook(_as_own_tensor)
    if tied:
        head.weight = embedding.weight  # type: ignore[union-attr]


def reduce_replicated_gradients(module: nn.Module, mesh: DeviceMesh) -> None:
    """Adds up over `mesh` the gradients of the parameters that each of its processes has whole: norms and residual.

    Each process's cover its own tokens only. The gradients of the others are split as their parameters are, which an
    embedding's may not have been. To be called once, after the backward passes of an optimizer step.
    """
    for parameter in module.parameters():
        gradient = parameter.grad
        if isinstance(gradient, DTensor) and gradient.placements != parameter.placements:  # type: ignore[attr-defined]
            parameter.grad = gradient.redistribute(placements=parameter.placements)  # type: ignore[attr-defined]
    gradients = [
        parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad
        for parameter in module.parameters()
        if parameter.grad is not None and not _is_split(parameter, mesh)
    ]
    if not gradients:
        return
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    distributed.all_reduce(flat, group=mesh.get_group())
    for gradient, total in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(total.view_as(gradient))


def _split(module: nn.Module, mesh: DeviceMesh, styles: dict[str, ParallelStyle]) -> None:
    for name, style in styles.items():
        # src_data_rank None: no process sends the others weights that they have already
        parallelize_module(module.get_submodule(name), mesh, style, src_data_rank=None)


def split_layer(
    layer: Layer, mesh: DeviceMesh, tokens: Placement, of_whole: Callable[[Tensor], Tensor] | None = None
) -> None:
    """Splits a layer's parameters over the 1-D `mesh`, in place, before or after they have values.

    tokens: where those lie that it then takes and returns: TOKENS, or Replicate() for all of them on every process.
    of_whole: what it computes with instead of a parameter that is not split.
    """
    places = []
    for module, name, dim in list(split_parameters(layer)):
        parameter = module.get_parameter(name)
        if not isinstance(parameter, DTensor):  # experts that are split already
            part = distribute_tensor(parameter.data, mesh, [Shard(dim)], src_data_rank=None)
            module.register_parameter(name, nn.Parameter(part, parameter.requires_grad))
            places.append((module, name))
    if of_whole is not None:
        places = [(m, name) for m in layer.modules() for name, p in m._parameters.items() if p is not None]
    forward = layer.forward

    def own_part(parameter: Any) -> Any:
        return parameter.to_local() if isinstance(parameter, DTensor) else of_whole(parameter)  # type: ignore[misc]

    def forward_share(x: Tensor, context: Context) -> Tensor:
        gathered = DTensor.from_local(x, mesh, [tokens]).redistribute(placements=[Replicate()])
        with own_parts(places, own_part):
            share = forward(gathered.to_local(grad_placements=[Partial()]), context)
        return DTensor.from_local(share, mesh, [Partial()]).redistribute(placements=[tokens]).to_local()

    def total(part: Tensor) -> Tensor:
        whole = DTensor.from_local(part, mesh, [Partial()]).redistribute(placements=[Replicate()])
        return whole.to_local(grad_placements=[Partial()])

    layer.processes, layer.total = mesh.size(), total
    layer.forward = forward_share  # type: ignore[method-assign, assignment]


@contextmanager
def own_parts(
    places: list[tuple[nn.Module, str]], part: Callable[[Any], Any] = lambda parameter: parameter.to_local()
) -> Iterator[None]:
    """Within, part(parameter) stands in place of every parameter (module, name); to autograd a DTensor's local part is
    the same tensor."""
    held = [module._parameters[name] for module, name in places]
    try:
        for (module, name), parameter in zip(places, held, strict=True):
            module._parameters[name] = part(parameter)
        yield
    finally:
        for (module, name), parameter in zip(places, held, strict=True):
            module._parameters[name] = parameter


def _as_own_tensor(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
    """The local part of a DTensor is a view, perhaps of a longer one, and FSDP and pipeline stages want none."""
    return torch.ops.aten._unsafe_view(output.contiguous(), output.shape)


def _is_split(parameter: Tensor, mesh: DeviceMesh) -> bool:
    assert mesh.mesh_dim_names is not None
    names = parameter.device_mesh.mesh_dim_names if isinstance(parameter, DTensor) else ()
    return mesh.mesh_dim_names[0] in (names or ())
