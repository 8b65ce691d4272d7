"""What a chunk keeps for its backward pass, per micro-batch, found by running the model on tensors without data."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from ..model import DecoderConfig
from ..model.decoder import stream_dtype
from ..model.layer import layers_of
from ..model.layers.experts import Experts, MixtureOfExperts
from ..ops.dispatch import shapes_only
from ..parallel.part import ModelPart
from ..residual import State


class Footprint(NamedTuple):
    """Bytes of one chunk and one micro-batch on one process.

    kept: from the forward pass to the backward pass, without the tensors of the residual state that the chunk receives
    or hands on; with the logits and log-probabilities of the output head.
    working: the most that a single pass holds besides: a recomputed Transformer block, autocast's copies of the
    matrices where they are not kept, or the gradients of the logits.
    """

    kept: int
    working: int


def footprints(
    config: DecoderConfig,
    cuts: Sequence[int],
    shape: tuple[int, int, int],
    precision: torch.dtype,
    tp: int = 1,
    checkpointing: bool = False,
    ep: int = 1,
) -> list[Footprint]:
    """The footprint of every chunk.

    Args:
        cuts: the first layer of every chunk, and num_layers.
        shape: [b, T / tp, D] of the residual stream of a micro-batch on one process.
        precision: bfloat16 for autocast to it, else the dtype of everything.
        tp: processes that split a layer's matrices.
        checkpointing: keep each Transformer block's input state, and compute the rest again.
        ep: processes that share the experts; as many rows come to each as it sends.

    Counted is what the fused kernels keep (`ops.dry`) with a lean state. The eager backend keeps more, and so do
    parts of a mechanism that torch fuses on GPUs only. Gradients of activations and temporaries are not counted.
    """
    rows, tokens, _ = shape
    with FakeTensorMode(), shapes_only():
        model = _model(config, tokens * tp, tp, ep, precision)
        state: State = torch.zeros(rows, tokens, dtype=torch.int64)
        found = []
        for first, last in itertools.pairwise(cuts):
            state = pytree.tree_map_only(Tensor, _leaf, state)
            footprint, state = _run(model, state, first, last, precision, checkpointing)
            found.append(footprint)
    return found


def share(config: DecoderConfig, tp: int) -> DecoderConfig:
    """The shape as one of tp processes has it, the first: its heads, inner width and rows of the vocabulary."""
    sizes = {name: getattr(config, name) // tp for kind in config.layer_kinds for name in kind.divides}
    if "num_key_value_heads" not in sizes:  # which no layer uses, and still must divide the others
        sizes["num_key_value_heads"] = sizes.get("num_attention_heads", config.num_attention_heads)
    return dataclasses.replace(config, vocab_size=-(-config.vocab_size // tp), **sizes)


def keep_experts(model: nn.Module, ep: int) -> None:
    """Leaves every mixture of experts the share of one of ep processes, the first, in place."""
    for layer in layers_of(model):
        for name in layer.experts:
            whole = getattr(layer, name).detach()
            layer.register_parameter(name, nn.Parameter(whole[: len(whole) // ep]))


def _run(
    model: ModelPart, state: State, first: int, last: int, precision: torch.dtype, checkpointing: bool
) -> tuple[Footprint, State]:
    """The layers first .. last - 1, and the state after them. state: the token ids in front of the first."""
    parameters = list(model.parameters())
    kept = _Storages([*parameters, *(pytree.tree_leaves(state) if first else [])])
    working = _copies(model, first, last, precision) if checkpointing else 0
    with _autocast(precision):
        if first == 0:
            with kept.saved():
                state = model.residual.start(stream_dtype(model.embed_tokens(state)))
        context = model.context(model.context_length, torch.device("cpu"))
        while first < last:
            end = min(first + 2 - first % 2, last)
            block = _Storages([*parameters, *pytree.tree_leaves(state)])
            if checkpointing:
                kept.add([context, state])
            with (block if checkpointing else kept).saved():
                state = model.run_layers(state, first, end, context)
            working = max(working, block.bytes())
            first = end
        if last < model.config.num_layers:
            return Footprint(kept.bytes(without=pytree.tree_leaves(state)), working), state
        with kept.saved():
            logits = model.lm_head(model.residual.finish(state, model.norm))
    kept.add(logits)
    with kept.saved():
        scores = logits.flatten(0, 1).float()
        F.cross_entropy(scores, torch.zeros(len(scores), dtype=torch.int64))
    return Footprint(kept.bytes(), max(working, logits.nbytes + scores.nbytes)), state


class _Storages:
    """Distinct pieces of memory but those `left_out`. They are held, so that none is counted for another's address."""

    def __init__(self, left_out: Iterable[Any]) -> None:
        self._left_out = {_key(tensor): tensor for tensor in left_out if isinstance(tensor, Tensor)}
        self._held: dict[int, Tensor] = {}

    def add(self, tensors: Any) -> None:
        for tensor in pytree.tree_leaves(tensors):
            if isinstance(tensor, Tensor) and _key(tensor) not in self._left_out:
                self._held[_key(tensor)] = tensor

    @contextmanager
    def saved(self) -> Iterator[None]:
        """Adds what autograd saves meanwhile."""

        def pack(tensor: Tensor) -> Tensor:
            self.add(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield

    def bytes(self, without: Iterable[Any] = ()) -> int:
        others = {_key(tensor) for tensor in without if isinstance(tensor, Tensor)}
        return sum(tensor.untyped_storage().nbytes() for key, tensor in self._held.items() if key not in others)


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_(tensor.is_floating_point())


def _autocast(precision: torch.dtype) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16)


def _copies(model: ModelPart, first: int, last: int, precision: torch.dtype) -> int:
    """Bytes of autocast's copies of the matrices of the layers first .. last - 1; it makes none of experts."""
    matrices = [w for layer in model.layers[first:last] for w in layer.parameters() if w.dim() == 2]
    return sum(w.numel() * precision.itemsize for w in matrices if w.dtype != precision)


def _first_expert(layer: MixtureOfExperts, is_split: bool, _: object) -> Experts:
    """All rows to one expert, since there is no routing without data: what is kept is the same for any routing.

    As on GPUs, and wherever experts are split; a CPU with all of them keeps less.
    """

    def run(x_RD: Tensor, count_E: Tensor) -> Tensor:
        weights: list[Tensor] = [layer.gate_proj, layer.up_proj, layer.down_proj]
        if torch.is_autocast_enabled("cpu"):
            weights = [weight.to(torch.get_autocast_dtype("cpu")) for weight in weights]
        gate_ID, up_ID, down_DI = (weight[0] for weight in weights)
        order_R = torch.zeros(len(x_RD), dtype=torch.int64)
        x_RD = x_RD.index_select(0, order_R) if is_split else x_RD
        y_RD = F.linear(layer.activation(F.linear(x_RD, gate_ID), F.linear(x_RD, up_ID)), down_DI)
        return y_RD.index_select(0, order_R.argsort()) if is_split else y_RD

    return run


def give_fake_tensors(model: nn.Module, dtype: torch.dtype, ep: int = 1) -> None:
    """Tensors without data in place of those on the meta device, under FakeTensorMode; parameters in `dtype`, and tied
    ones apart. Experts then run for any routing (`_first_expert`)."""
    for module in model.modules():  # Module.to would not do for tensors without data
        for name, parameter in list(module.named_parameters(recurse=False)):
            module.register_parameter(name, nn.Parameter(torch.empty(parameter.shape, dtype=dtype)))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))
    for layer in layers_of(model):
        if layer.experts:
            layer.exchange = partial(_first_expert, layer, ep > 1)  # type: ignore[assignment, arg-type]


def _model(config: DecoderConfig, context: int, tp: int, ep: int, precision: torch.dtype) -> ModelPart:
    """The whole model as one of tp and ep processes has it, with fake parameters; its layers take and return T / tp
    tokens."""
    with torch.device("meta"):
        model = ModelPart(share(config, tp), 0, config.num_layers, context)
        keep_experts(model, ep)
    give_fake_tensors(model, torch.promote_types(precision, torch.float32), ep)
    model.residual.lean = True
    if tp > 1:
        for module in (*model.layers, model.lm_head):
            module.register_forward_pre_hook(lambda _, inputs: (torch.cat([inputs[0]] * tp, 1), *inputs[1:]))
        for layer in model.layers:
            layer.register_forward_hook(lambda _, inputs, output: output[:, : context // tp].contiguous())
        rows = config.vocab_size  # the last process may have fewer
        model.lm_head.register_forward_hook(
            lambda _, inputs, output: torch.cat([output] * tp, -1)[..., :rows].contiguous()
        )
    return model
