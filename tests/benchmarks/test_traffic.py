"""What the kernels and the residual path move, counted in Triton's interpreter, against the byte model.

Sources are fp16 and nothing else is: an access to fp16 memory is one to a row. Within a kernel every row counts once,
as caches hold it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")
import triton.language as tl
from triton.runtime import interpreter

from attnres import BlockAttnRes, FullAttnRes, ops
from attnres.ops.triton import inter_block, inter_block_backward
from attnres.ops.triton.backend import TRITON as kernels

pytestmark = pytest.mark.usefixtures("interpreted")
TOKENS, WIDTH, EPS = 2, 24, 1e-6
ALLOCATES = ("empty", "empty_like", "new_empty", "empty_strided")


class Traffic(TorchDispatchMode):
    """Adds up fp16 elements that kernels and PyTorch's own operations load and store."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.elements, self.paused = 0, False
        self.loaded: set[int] = set()
        self.stored: set[int] = set()
        builder, launch = interpreter.InterpreterBuilder, interpreter.GridExecutor.__call__
        load, store = builder.create_masked_load, builder.create_masked_store

        def counted_load(builder: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
            if pointers.get_element_ty() == tl.float16:
                self.loaded.update(np.asarray(pointers.data)[np.asarray(mask.data)].tolist())
            return load(builder, pointers, mask, *rest)

        def counted_store(builder: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
            if pointers.get_element_ty() == tl.float16:
                self.stored.update(np.asarray(pointers.data)[np.asarray(mask.data)].tolist())
            return store(builder, pointers, value, mask, *rest)

        def counted_launch(*arguments: Any, **keywords: Any) -> Any:
            with self.pause():  # what the interpreter does with tensors is no traffic
                result = launch(*arguments, **keywords)
            self.elements += len(self.loaded) + len(self.stored)
            self.loaded.clear()
            self.stored.clear()
            return result

        monkeypatch.setattr(builder, "create_masked_load", counted_load)
        monkeypatch.setattr(builder, "create_masked_store", counted_store)
        monkeypatch.setattr(interpreter.GridExecutor, "__call__", counted_launch)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        aten = func.namespace == "aten" and func.overloadpacket.__name__ not in ALLOCATES and not func.is_view
        if aten and not self.paused:
            tensors = [t for t in torch.utils._pytree.tree_leaves((args, result)) if isinstance(t, Tensor)]
            self.elements += sum(t.numel() for t in tensors if t.dtype == torch.float16)
        return result

    @contextmanager
    def pause(self) -> Iterator[None]:
        before, self.paused = self.paused, True
        yield
        self.paused = before

    def passes(self, call: Callable[[], Any]) -> tuple[float, Any]:
        self.elements = 0
        with self:
            result = call()
        return self.elements / (TOKENS * WIDTH), result


@pytest.fixture
def traffic(monkeypatch: pytest.MonkeyPatch) -> Iterator[Traffic]:
    ops.set_backend("triton")
    monkeypatch.setattr(inter_block, "few_tokens", lambda num_tokens: False)  # as in training
    yield Traffic(monkeypatch)
    ops.set_backend("auto")


def rows(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(count)
    return [torch.randn(TOKENS, WIDTH, generator=generator).half().requires_grad_() for _ in range(count)]


def vectors(*leading: int) -> tuple[Tensor, Tensor]:
    return torch.randn(*leading, WIDTH, requires_grad=True), torch.ones(*leading, WIDTH, requires_grad=True)


def both_ways(traffic: Traffic, call: Callable[[], Any], sources: list[Tensor], gradients: int) -> list[float]:
    """Passes forward and backward; the first `gradients` outputs have one."""
    forward, outputs = traffic.passes(call)
    outputs = outputs[:gradients]
    directions = [torch.ones_like(output) for output in outputs]
    backward, _ = traffic.passes(lambda: torch.autograd.grad(outputs, sources, directions))
    return [forward, backward]


@pytest.mark.parametrize("chained", [False, True])
@pytest.mark.parametrize("n", [1, 3, 6])
def test_a_read(benchmarks: Path, traffic: Traffic, n: int, chained: bool) -> None:
    import byte_model

    sources, (query, key_norm), norm = rows(n), vectors(), (torch.ones(WIDTH, requires_grad=True), EPS)

    def call() -> list[Tensor]:
        x, handed_on = kernels.read_norm_chained(query, sources, key_norm, EPS, scale=2.0, norm=norm)
        return [x, *handed_on]

    moved = both_ways(traffic, call, sources, 1 + n if chained else 1)
    assert moved == list(byte_model.read(n, byte_model.CHAINED if chained else 0))


@pytest.mark.parametrize("chained", [False, True])
@pytest.mark.parametrize("n", [1, 6])
def test_a_read_that_goes_on_from_phase_1(benchmarks: Path, traffic: Traffic, n: int, chained: bool) -> None:
    import byte_model

    (out, *sources), (query, key_norm), norm = rows(n + 1), vectors(), (torch.ones(WIDTH, requires_grad=True), EPS)
    lse = torch.zeros(TOKENS, requires_grad=True)

    def call() -> list[Tensor]:
        prior = (out, lse)
        x, handed_on = kernels.read_norm_chained(query, sources, key_norm, EPS, scale=2.0, norm=norm, prior=prior)
        return [x, *handed_on]

    moved = both_ways(traffic, call, [out, *sources], 1 + n if chained else 1)
    assert moved == list(byte_model.read(n, byte_model.CHAINED if chained else 0, prior=True))


def test_phase_1_holds_as_many_rows_as_the_model_says(benchmarks: Path) -> None:
    import byte_model

    assert byte_model.FEW_QUERIES == inter_block_backward.MAX_QUERIES
    assert byte_model.FEW_SOURCES == inter_block_backward.MAX_SOURCES


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("chained", [False, True])
@pytest.mark.parametrize(("n", "queries"), [(1, 3), (1, 5), (2, 1), (2, 4), (12, 2), (13, 2), (5, 6)])
def test_phase_1(benchmarks: Path, traffic: Traffic, n: int, queries: int, chained: bool, normed: bool) -> None:
    import byte_model

    sources, (q, g) = rows(n), vectors(queries)
    norm = (torch.ones(WIDTH, requires_grad=True), EPS) if normed else None

    def call() -> list[Tensor]:
        outs, _, handed_on = kernels.inter_block_chained(q, sources, g, EPS, scale=2.0 if normed else 1.0, norm=norm)
        return [*outs, *handed_on]

    moved = both_ways(traffic, call, sources, queries + n if chained else queries)
    assert moved == list(byte_model.inter_block(n, queries, byte_model.CHAINED if chained else 0, normed))


@pytest.mark.parametrize("first", [True, False])
def test_phase_2(benchmarks: Path, traffic: Traffic, first: bool) -> None:
    import byte_model

    (partial, update, out), (query, key_norm) = rows(3), vectors()
    lse, norm = torch.zeros(TOKENS, requires_grad=True), (torch.ones(WIDTH, requires_grad=True), EPS)

    def call() -> tuple[Tensor, Tensor]:
        before = None if first else partial
        return kernels.merge_norm(query, before, update, key_norm, out, lse, EPS, scale=2.0, norm=norm)

    assert both_ways(traffic, call, [update, out], 2) == list(byte_model.merge(first))


def test_norms(benchmarks: Path, traffic: Traffic) -> None:
    import byte_model

    (stream, update), norm = rows(2), (torch.ones(WIDTH, requires_grad=True), EPS)
    moved = both_ways(traffic, lambda: kernels.add_norm(stream, update, norm=norm), [update], 2)
    assert moved == list(byte_model.add_norm())
    moved = both_ways(traffic, lambda: [kernels.rms_norm(update, norm)], [update], 1)
    assert moved == list(byte_model.norm())


def path(traffic: Traffic, residual: nn.Module, num_layers: int, gradients: bool = True) -> list[float]:
    """Passes of a residual path, forward and, with gradients, backward. Its layers cost nothing, for they run while
    nobody counts."""

    class Layer(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            with traffic.pause():
                return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
            with traffic.pause():
                return gradient.clone()

    norms = [nn.RMSNorm(WIDTH, EPS) for _ in range(num_layers + 1)]
    (embedding,) = rows(1)

    @torch.set_grad_enabled(gradients)
    def forward() -> list[Tensor]:
        state = residual.start(embedding)
        for i in range(num_layers):
            x, state = residual.read(state, i, norms[i])
            state = residual.write(state, i, Layer.apply(x))
        return [residual.finish(state, norms[-1])]

    return both_ways(traffic, forward, [embedding], 1) if gradients else [traffic.passes(forward)[0]]


@pytest.mark.parametrize(("L", "S"), [(7, 3), (6, 3), (3, 1), (4, 4), (4, 2), (11, 5), (13, 6)])
def test_two_phase_path(benchmarks: Path, traffic: Traffic, L: int, S: int) -> None:
    import byte_model

    residual = BlockAttnRes(WIDTH, L, block_size=S, stream_scale=True, schedule="two_phase")
    assert path(traffic, residual, L) == list(byte_model.two_phase_rows(L, S))


@pytest.mark.parametrize(("L", "S"), [(5, 2), (4, 4), (4, 1)])
def test_layer_by_layer_path(benchmarks: Path, traffic: Traffic, L: int, S: int) -> None:
    import byte_model

    block = BlockAttnRes(WIDTH, L, block_size=S, stream_scale=True, schedule="layerwise")
    assert path(traffic, block, L) == list(byte_model.per_read_chained(L, S))
    if S == 1:
        assert path(traffic, FullAttnRes(WIDTH, L), L) == list(byte_model.per_read_chained(L, S))


@pytest.mark.parametrize(("L", "size"), [(1, None), (2, None), (5, None), (10, None), (17, 4), (11, 5)])
def test_full_two_phase_path(
    benchmarks: Path, traffic: Traffic, monkeypatch: pytest.MonkeyPatch, L: int, size: int | None
) -> None:
    import byte_model

    residual = FullAttnRes(WIDTH, L, stream_scale=True, schedule="two_phase")
    residual.group_size = size or residual.group_size
    assert path(traffic, residual, L) == list(byte_model.full_two_phase_rows(L, layerwise_first=False, size=size))
    residual.schedule = "auto"
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)  # where "auto" takes two phases
    assert path(traffic, residual, L) == list(byte_model.full_two_phase_rows(L, size=size))


@pytest.mark.parametrize(("L", "S"), [(7, 3), (4, 4), (3, 1), (12, 6)])
def test_path_without_gradients(
    benchmarks: Path, traffic: Traffic, monkeypatch: pytest.MonkeyPatch, L: int, S: int
) -> None:
    import byte_model

    block = BlockAttnRes(WIDTH, L, block_size=S, stream_scale=True, schedule="two_phase")
    assert path(traffic, block, L, gradients=False) == [byte_model.inference_rows(L, S)]
    monkeypatch.setattr(inter_block, "few_tokens", lambda num_tokens: True)
    assert path(traffic, block, L, gradients=False) == [byte_model.inference_rows(L, S, few_tokens=True)]
