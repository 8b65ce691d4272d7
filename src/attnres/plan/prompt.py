"""What a prompt takes of a process's memory without gradients: weights, cache, what the residual connection keeps over
depth, and the layer that runs.

The blocks of Block AttnRes take N T D elements (paper section 4): 15 GB for 128K tokens, 8 blocks and a width of 7168
in bfloat16. Over P processes of tensor parallelism each holds T / P tokens of them (`attnres.model.token_shards`), and
of a prompt that is read in chunks only the chunk's. Weights and cache are exact; the rest is found by running one layer
of each kind, and the residual connection over all of them, on tensors without data. Attention counts as one fused
kernel, and the cache as one that grows by copying, a layer at a time.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed import ProcessGroup
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..errors import check_counts
from ..model import Decoder, DecoderConfig
from ..model.cache import KeyValueCache
from ..model.layer import layers_of
from ..model.loop import input_norm, run
from ..model.token_shards import TokenShards
from ..ops.dispatch import shapes_only
from ..ops.no_grad import CHUNK as STACK
from ..parallel.config import ParallelConfig
from ..residual import Residual, State
from .kept import give_fake_tensors, share


@dataclass
class InferencePlan:
    """Memory of one process at the end of a prompt, in bytes.

    processes: of tensor parallelism; tokens: read at a time. parameters: elements held; cache_bytes: keys and values,
    latents and states of linear attention, at the full length. block_bytes: of the N blocks alone, as the paper counts
    them, None for mechanisms without; state_bytes: the most that the residual connection keeps, with the embedding, the
    partial sum and phase 1's results. working_bytes: the most that a layer or a read holds besides. total_bytes: of all
    but the blocks, which are in the state.
    """

    processes: int
    tokens: int
    parameters: int
    weight_bytes: int
    cache_bytes: int
    block_bytes: int | None
    state_bytes: int
    working_bytes: int
    total_bytes: int

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def plan_inference(
    config: DecoderConfig,
    rows: int,
    context: int,
    tp: int = 1,
    chunk: int | None = None,
    precision: torch.dtype = torch.bfloat16,
    device: str = "cuda",
) -> InferencePlan:
    """Plans reading `rows` prompts of `context` tokens, `chunk` tokens of each at a time (None: all at once).

    tp: processes that share the model; precision: of weights and activations; device: "cuda", where a mechanism's
    schedule and the kernels are those of a GPU, or "cpu".

    Raises UsageError for sizes that are not positive and for a tp that does not divide the heads.
    """
    check_counts(batch_size=rows, context=context, prefill_chunk=1 if chunk is None else chunk)
    ParallelConfig(tp=tp).check(tp, config, batch_size=1, context=tp)
    tokens = min(chunk or context, context)
    # the last chunk has the most before it, and a rest of the prompt has fewer tokens than a whole chunk
    past = context - tokens
    with FakeTensorMode(), shapes_only(), torch.no_grad():
        model = _model(share(config, tp), precision)
        if device == "cuda" and getattr(model.residual, "schedule", None) == "auto" and model.residual.fused:
            model.residual.schedule = "two_phase"  # type: ignore[assignment]
        shards = _SilentShards(tp, tokens)
        kinds = {type(layer): layer for layer in model.layers}
        working = {kind: _layer_bytes(model, layer, shards, rows, past, precision) for kind, layer in kinds.items()}
        stack = STACK * torch.get_num_threads() if device == "cpu" else 0
        peak, state = _walk(model, shards, rows, precision, lambda layer: working[type(layer)], stack)
        cache = _bytes(_cache(model, rows, context, precision))
    parameters = {id(p): p for p in model.parameters()}.values()
    weights = sum(p.numel() * p.element_size() for p in (*parameters, *model.buffers()))
    blocks = getattr(model.residual, "num_blocks", None)
    one = rows * shards.count * config.hidden_size * precision.itemsize
    return InferencePlan(
        processes=tp,
        tokens=tokens,
        parameters=sum(p.numel() for p in parameters),
        weight_bytes=weights,
        cache_bytes=cache,
        block_bytes=None if blocks is None else blocks * one,
        state_bytes=state,
        working_bytes=peak - state,
        total_bytes=weights + cache + peak,
    )


class _SilentShards(TokenShards):
    """Those of the first of so many processes, that say nothing to each other."""

    def __init__(self, processes: int, tokens: int) -> None:
        super().__init__(cast(ProcessGroup, _Group(processes)), tokens)

    def _all_gather(self, into: Tensor, own: Tensor) -> None: ...

    def _reduce_scatter(self, into: Tensor, parts: Tensor) -> None: ...

    def _all_reduce(self, partial: Tensor) -> None: ...


class _Group:
    def __init__(self, processes: int) -> None:
        self.size, self.rank = lambda: processes, lambda: 0


class _Live(TorchDispatchMode):
    """Bytes that operations have allocated and that are still held, and the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            self._add(tensor, was_there=True)
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            self._add(tensor)
        self.most = max(self.most, self.now)
        return result

    def forget(self, tensor: Tensor) -> None:
        """Counts the tensor no longer, though it is held."""
        self.now -= self._known.get(key := tensor.untyped_storage()._cdata, 0)
        self._known[key] = 0

    def _add(self, tensor: Any, was_there: bool = False) -> None:
        if not isinstance(tensor, Tensor) or tensor.untyped_storage()._cdata in self._known:
            return
        storage = tensor.untyped_storage()
        self._known[storage._cdata] = 0 if was_there else storage.nbytes()
        self.now += self._known[storage._cdata]
        weakref.finalize(storage, self._remove, storage._cdata)

    def _remove(self, key: int) -> None:
        self.now -= self._known.pop(key, 0)


def _layer_bytes(
    model: Decoder, layer: nn.Module, shards: TokenShards, rows: int, past: int, precision: torch.dtype
) -> int:
    """The most that a layer holds beside its own tokens' input and the cache as it leaves it."""
    context = model.context(shards.tokens, model.embed_tokens.weight.device)
    x = torch.empty(rows, shards.count, model.config.hidden_size, dtype=precision)
    with _Live() as live:
        cache = _cache(model, rows, past, precision, layer)
        given = context._replace(cache=cache, attend=_fused_attention)
        shards.take(layer, layer(shards.gather(x), given))
        return live.most - _bytes(cache)


def _fused_attention(layer: Any, q_BHTE: Tensor, k_BKSE: Tensor, v_BKSE: Tensor, mask: Any) -> Tensor:
    batch, heads, tokens, _ = q_BHTE.shape
    return q_BHTE.new_empty(batch, tokens, heads, v_BKSE.shape[-1])


def _walk(
    model: Decoder,
    shards: TokenShards,
    rows: int,
    precision: torch.dtype,
    working: Callable[[nn.Module], int],
    stack: int,
) -> tuple[int, int]:
    """The most bytes at one time over all reads, writes and layers, and the most in the state alone.

    stack: the most elements of sources that a read stacks.
    """
    num_sources = getattr(model.residual, "num_sources", lambda layer: 0)
    depth, norms = len(model.layers), [input_norm(layer) for layer in model.layers]
    with _Live() as live:
        residual = _Measured(model.residual, (rows, shards.count, model.config.hidden_size), precision)

        def call(i: int, x: Tensor) -> Tensor:
            torch.empty(min(stack, num_sources(i) * x.numel()), dtype=torch.float32)
            output = torch.empty_like(x)
            if not residual.holds(x):
                live.forget(x)
            torch.empty(max(0, working(model.layers[i]) - output.nbytes), dtype=torch.uint8)
            return output

        state = run(residual, range(depth), None, 0, depth, call=call, norm=norms.__getitem__)  # type: ignore[arg-type]
        x = model.residual.finish(state, model.norm)
        torch.empty(min(stack, num_sources(depth) * x.numel()), dtype=torch.float32)
        shards.gather(x)
    return live.most, residual.most


class _Measured:
    """A residual connection, and the most bytes that its states had behind a read or a write.

    It starts with its first read: whoever named the state before that would hold the embedding to the end.
    """

    def __init__(self, residual: Residual, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
        self.residual, self.most, self.shape, self.dtype = residual, 0, shape, dtype

    def read(self, state: State, layer: int, norm: nn.Module | None) -> tuple[Tensor, State]:
        state = self.residual.start(torch.empty(self.shape, dtype=self.dtype)) if state is None else state
        x, state = self.residual.read(state, layer, norm)
        return x, self._seen(state)

    def write(self, state: State, layer: int, output: Tensor) -> State:
        return self._seen(self.residual.write(state, layer, output))

    def holds(self, tensor: Tensor) -> bool:
        """Whether the newest state has that memory."""
        return tensor.untyped_storage()._cdata in self._storages

    def _seen(self, state: State) -> State:
        # of tokens: without the queries that DepthAttention folds for a pass, which are parameters' size
        of_tokens = state._replace(folded=None) if hasattr(state, "folded") else state
        tensors = [t for t in tree_leaves(of_tokens) if isinstance(t, Tensor)]
        self._storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
        self.most = max(self.most, sum(self._storages.values()))
        return state


def _cache(
    model: Decoder, rows: int, tokens: int, precision: torch.dtype, only: nn.Module | None = None
) -> KeyValueCache:
    """What the layers (or only that one) keep of so many tokens."""
    cache, config = KeyValueCache(), model.config
    for layer in layers_of(model):
        if tokens and only in (None, layer):
            layer.keep(cache, rows, tokens, precision)
    cache.claim(config)
    return cache


def _bytes(cache: KeyValueCache) -> int:
    kept = tree_leaves([cache.keys, cache.values, cache.states])
    return sum(tensor.nbytes for tensor in kept)


def _model(config: DecoderConfig, precision: torch.dtype) -> Decoder:
    """The model as one process has it, with parameters that take no memory."""
    with torch.device("meta"):
        model = Decoder(config)
    give_fake_tensors(model, precision)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.embed_tokens.weight
    for layer in model.layers:
        layer.leaves_partial_sums = True  # type: ignore[assignment]
    return model.eval()
