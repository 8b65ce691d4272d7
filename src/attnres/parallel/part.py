"""A piece of a decoder: consecutive layers, under the names they have in the whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from ..model import DecoderConfig
from ..model.decoder import Backbone, stream_dtype
from ..model.loop import run
from ..ops.dispatch import shapes_only
from ..residual import State


class Border(NamedTuple):
    """The residual state between two layers as a tuple of tensors.

    names: `Residual.tensor_names`; like: tensors of the same shapes and dtypes without data.
    """

    names: tuple[str, ...]
    like: tuple[Tensor, ...]
    spec: pytree.TreeSpec
    present: tuple[bool, ...]

    def flatten(self, state: State) -> tuple[Tensor, ...]:
        leaves, spec = pytree.tree_flatten(state)
        assert spec == self.spec, f"the state became {spec}, it was to be {self.spec}"
        return tuple(leaf for leaf, there in zip(leaves, self.present, strict=True) if there)

    def unflatten(self, tensors: Sequence[Tensor]) -> State:
        remaining = iter(tensors)
        return pytree.tree_unflatten([next(remaining) if there else None for there in self.present], self.spec)


def borders(config: DecoderConfig, cuts: Sequence[int], shape: tuple[int, ...], dtype: torch.dtype) -> list[Border]:
    """The states in front of the layers `cuts`, all above 0, of a network whose stream has this shape and dtype."""
    found = []
    parameters_in = torch.promote_types(dtype, torch.float32)
    with FakeTensorMode(), shapes_only(), torch.no_grad():
        residual = config.build_residual()
        for module in residual.modules():  # Module.to would not do for tensors without data
            for name, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(parameter.to(parameters_in)))
        residual.lean = True

        def note(state: State, layer: int) -> None:
            if layer in cuts:
                leaves, spec = pytree.tree_flatten(state)
                kinds = [(leaf.shape, leaf.dtype) for leaf in leaves if leaf is not None]
                names = tuple(residual.tensor_names(state, layer))
                found.append((names, kinds, spec, tuple(leaf is not None for leaf in leaves)))

        last, state = max(cuts, default=0), residual.start(torch.empty(shape, dtype=dtype))
        layers = range(last)
        state = run(residual, layers, state, 0, last, call=lambda _, x: torch.empty_like(x), observe=note)
        note(state, last)
    return [
        Border(names, tuple(torch.empty(size, dtype=kind, device="meta") for size, kind in kinds), spec, present)
        for names, kinds, spec, present in found
    ]


class ModelPart(Backbone):
    """The layers first .. last - 1 of a decoder, with the embedding before the first and norm and head after the last.

    The first part takes token ids [B, T]; the others take the tensors of `before`. The last returns logits [B, T, V];
    the others return those tensors of `after` that `before` lacks. precision: bfloat16 for autocast to it.
    """

    def __init__(
        self,
        config: DecoderConfig,
        first: int,
        last: int,
        context_length: int,
        before: Border | None = None,
        after: Border | None = None,
    ) -> None:
        super().__init__()
        self.precision = torch.float32
        self.config = config
        self.first, self.last, self.context_length = first, last, context_length
        self.before, self.after = before, after
        self.add_modules(config)
        self.residual.keep_layers(first, last)
        self.residual.lean = not (self.is_first and self.is_last)
        for i in range(len(self.layers)):
            if not first <= i < last:
                self.layers[i] = cast(nn.Module, None)  # absent, with no change to the names of the others
        if not self.is_first:
            del self.embed_tokens
        if not self.is_last:
            del self.norm
            return
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings and self.is_first:
            self.lm_head.weight = self.embed_tokens.weight

    @property
    def is_first(self) -> bool:
        return self.first == 0

    @property
    def is_last(self) -> bool:
        return self.last == self.config.num_layers

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        with torch.autocast(inputs[0].device.type, torch.bfloat16, enabled=self.precision == torch.bfloat16):
            return self._forward(inputs)

    def _forward(self, inputs: tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
        if self.is_first:
            state = self.residual.start(stream_dtype(self.embed_tokens(inputs[0])))
        else:
            assert self.before is not None
            state = self.before.unflatten(inputs)
        state = self.run_layers(state, self.first, self.last, self.context(self.context_length, inputs[0].device))
        if self.is_last:
            logits: Tensor = self.lm_head(self.residual.finish(state, self.norm))
            return logits
        assert self.after is not None
        known = () if self.before is None else self.before.names
        leaving = zip(self.after.names, self.after.flatten(state), strict=True)
        return tuple(tensor for name, tensor in leaving if name not in known)

    def enable_checkpointing(self, enabled: bool = True) -> None:
        super().enable_checkpointing(enabled)
        self.residual.lean |= not (self.is_first and self.is_last)
