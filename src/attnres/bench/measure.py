"""The questions of `attnres bench`: a copy, a read, a training step, a decoded token; on CUDA the kernels too."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import ops
from ..errors import UsageError, check_counts
from ..model import Decoder, DecoderConfig
from ..model.cache import KeyValueCache
from ..run import hardware
from ..version import __version__
from . import rivals
from .clock import Calls, OutOfTime, limit, milliseconds, ratios, spread, turns

RESIDUALS = {
    "PreNorm": "prenorm",
    "Block AttnRes": "block_attnres",
    "Full AttnRes": "full_attnres",
    "mHC": "mhc",
}
SOURCES, PAST = 9, 64
"""Of the read; tokens in the cache before the one that is decoded."""
CONTEXT = 512
PUBLISHED = {
    (2, 1): {"FlagGems": 2.51, "vLLM": 2.60, "fla": 15.3},
    (5, 128): {"FlagGems": 4.67, "vLLM": 5.54, "fla": 17.0},
    (5, 1024): {"FlagGems": 30.4, "vLLM": 33.6, "fla": 111.2},
    (9, 128): {"FlagGems": 7.66, "vLLM": 8.23, "fla": 19.7},
    (9, 8192): {"FlagGems": 398.4, "vLLM": 468.1, "fla": 1027.0},
}
"""Microseconds of one read on an H100 by (sources, tokens), bf16, D = 7168: FlagGems-vllm, pull request 737."""


@dataclass
class Machine:
    """What is measured, and with how much time. Raises UsageError for what cannot be."""

    device: str = "auto"
    """Device: auto, cpu, cuda, cuda:1."""
    dtype: str = "auto"
    """float32 or bfloat16; auto is bfloat16 where the device multiplies it in hardware."""
    width: int | None = None
    """Width of the models; the default is 512 on a CPU and 2048 on CUDA."""
    layers: int = 12
    """Transformer blocks of the models."""
    tokens: int | None = None
    """Tokens of a training step and of the read; the default is 1024 on a CPU and 8192 on CUDA."""
    minutes: float = 2.5
    """Time for all of it; compiled steps are left out where they do not fit."""
    quick: bool = False
    """Half a minute and fewer layers: a first look."""
    rivals: bool = False
    """Also time other packages' reads, those that are installed."""

    def __post_init__(self) -> None:
        if self.dtype not in ("auto", "float32", "bfloat16"):
            raise UsageError(f"dtype must be auto, float32 or bfloat16; it is {self.dtype!r}")
        if not 0 < self.minutes <= 1e4:
            raise UsageError(f"minutes must be positive, at most 10000; it is {self.minutes}")
        large = self.where.type == "cuda"
        self.width = (2048 if large else 512) if self.width is None else self.width
        self.tokens = (8192 if large else 1024) if self.tokens is None else self.tokens
        if self.quick:
            self.minutes, self.layers = min(self.minutes, 0.5), min(self.layers, 4)
        check_counts(width=self.width, layers=self.layers, tokens=self.tokens)
        if self.width % 64:
            raise UsageError(f"width must be a multiple of 64, the size of an attention head; it is {self.width}")
        if self.tokens > CONTEXT and self.tokens % CONTEXT:
            raise UsageError(f"tokens beyond {CONTEXT} must be a multiple of it, as sequences are; it is {self.tokens}")

    @property
    def where(self) -> torch.device:
        return hardware.find_device(self.device)

    @property
    def precision(self) -> torch.dtype:
        return hardware.find_precision(self.dtype, self.where)


def bench(machine: Machine, progress: Callable[[str], object] = lambda question: None) -> dict[str, Any]:
    """Asks every question in the time that there is. Returns facts, "copy_gbs" and tables: by question the milliseconds
    of every call, their spread and their ratio to the first one's of the same round; and what was "left_out", why.

    Raises UsageError where the models do not fit into memory.
    """
    device, end = machine.where, time.monotonic() + 60 * machine.minutes
    _check_memory(machine)
    found: dict[str, Any] = {**_facts(machine), "tables": {}, "left_out": {}}
    progress("copy")
    found["copy_gbs"] = _copy(device)
    steps = f"training step, {machine.layers} Transformer blocks"
    questions: dict[str, tuple[float, Callable[[], Calls]]] = {
        f"read of {SOURCES} sources, forward and backward": (0.12, lambda: _reads(machine, found["left_out"])),
        steps: (0.5, lambda: _steps(machine)),
        "decoded token": (0.2, lambda: _decoding(machine)),
    }
    for name, (share, calls) in questions.items():
        progress(name)
        found["tables"][name] = _table(calls(), device, share * 60 * machine.minutes)
    if device.type == "cuda":
        progress("kernels")
        found["kernels"] = kernels(device)
    if machine.quick:
        found["left_out"]["compiled"] = "--quick leaves compiled steps out"
        return found
    progress(f"{steps}, compiled")
    _compiled(machine, f"{steps}, compiled", found, end)
    return found


def kernels(device: torch.device, shapes: dict[tuple[int, int], Any] = PUBLISHED, width: int = 7168) -> list[Any]:
    """Microseconds of one read without gradients, bf16, beside those that others published for an H100."""
    rows = []
    for (count, tokens), published in shapes.items():
        query, key_norm = torch.randn(width, device=device), torch.ones(width, device=device)
        sources = [torch.randn(tokens, width, device=device, dtype=torch.bfloat16) for _ in range(count)]

        @torch.no_grad()
        def read(query: Tensor = query, key_norm: Tensor = key_norm, sources: list[Tensor] = sources) -> None:
            for _ in range(20):
                ops.read_norm(query, sources, key_norm, 1e-6)

        call: Callable[[], object] = read
        if device.type == "cuda":  # without what Python needs to start a kernel
            read()
            torch.cuda.synchronize(device)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                read()
            call = graph.replay
        call()
        own = spread([1e3 * milliseconds(call, device) / 20 for _ in range(7)])
        rows.append({"sources": count, "tokens": tokens, "microseconds": own, "published": published})
    return rows


def _facts(machine: Machine) -> dict[str, Any]:
    triton = None
    with suppress(importlib.metadata.PackageNotFoundError):
        triton = importlib.metadata.version("triton")
    return {
        "device": hardware.describe(machine.where),
        "threads": torch.get_num_threads() if machine.where.type == "cpu" else None,
        "dtype": str(machine.precision).removeprefix("torch."),
        "width": machine.width,
        "layers": machine.layers,
        "tokens": machine.tokens,
        "torch": torch.__version__,
        "triton": triton,
        "python": platform.python_version(),
        "version": __version__,
        "date": datetime.date.today().isoformat(),
    }


def _table(calls: Calls, device: torch.device, seconds: float) -> dict[str, Any]:
    times = turns(calls, device, seconds)
    first = next(iter(times))
    relative = ratios(times, first)
    return {
        name: {"milliseconds": spread(own), "ratio": relative[name], "turns": [round(t, 4) for t in own]}
        for name, own in times.items()
    }


def _check_memory(machine: Machine) -> None:
    """Raises UsageError for models that with their gradients, or rows that beside them, the device cannot hold."""
    parameters = sum(_config(machine, residual).parameter_counts()["total"] for residual in RESIDUALS.values())
    rows = 4 * SOURCES * (machine.tokens or 0) * (machine.width or 0)
    room = hardware.memory(machine.where)
    if room is not None and 4 * (2 * parameters + rows) > room:
        raise UsageError(
            f"width {machine.width}, {machine.layers} layers and {machine.tokens} tokens take "
            f"{4 * (2 * parameters + rows) / 2**30:,.0f} GiB at least and {machine.device} has {room / 2**30:,.0f}; "
            "give smaller ones"
        )


def _copy(device: torch.device) -> float:
    """Bytes read and written in nanoseconds by a copy of 256 MiB."""
    source = torch.ones(2**26, device=device)
    target = torch.empty_like(source)
    times = turns({"copy": lambda: target.copy_(source)}, device, 0.5)["copy"]
    return 2 * source.nbytes / spread(times)["median"] / 1e6


def _reads(machine: Machine, left_out: dict[str, str]) -> Calls:
    device, generator = machine.where, torch.Generator().manual_seed(0)
    shape = (machine.tokens or 0, machine.width or 0)
    sources = [torch.randn(shape, generator=generator).to(device, machine.precision) for _ in range(SOURCES)]
    query, key_norm = torch.randn(shape[1], generator=generator).to(device), torch.ones(shape[1], device=device)
    direction, leaves = torch.ones_like(sources[0]), [t.requires_grad_() for t in (query, key_norm, *sources)]
    forms: dict[str, rivals.Read] = {"straightforward": rivals.straightforward}
    forms["attnres"] = lambda query, sources, key_norm, eps, norm: ops.read_norm(query, sources, key_norm, eps)
    if machine.rivals:
        others, missing = rivals.load(device)
        forms |= {name: rival.read for name, rival in others.items() if rival.read is not None}
        left_out |= missing

    def call(read: rivals.Read) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(read(query, sources, key_norm, 1e-6, None), leaves, direction)

    calls = {name: call(read) for name, read in forms.items()}
    for name in [name for name in calls if name in rivals.LOADERS]:
        try:
            calls[name]()
        except Exception as error:  # of another package: any
            left_out[name] = f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
            del calls[name]
    return calls


def _decoders(machine: Machine, titles: Iterable[str] = RESIDUALS) -> dict[str, Decoder]:
    """One for each residual connection; layers, embedding and head start alike."""
    return {title: Decoder(_config(machine, RESIDUALS[title])).to(machine.where) for title in titles}


def _config(machine: Machine, residual: str) -> DecoderConfig:
    return DecoderConfig(
        hidden_size=machine.width or 0,
        num_hidden_layers=machine.layers,
        num_attention_heads=(machine.width or 0) // 64,
        max_position_embeddings=max(CONTEXT, PAST + 1),
        vocab_size=8192 if machine.where.type == "cuda" else 257,
        residual=residual,
    )


def _steps(machine: Machine, compiled: tuple[str, ...] | None = None) -> Calls:
    """Forward and backward; compiled: these models alone, by torch.compile."""
    models = _decoders(machine, compiled or RESIDUALS)
    context = min(CONTEXT, machine.tokens or 0)
    rows = max(1, (machine.tokens or 0) // context)
    ids = torch.randint(0, 257, (rows, context), generator=torch.Generator().manual_seed(0)).to(machine.where)

    def step(model: Decoder) -> Callable[[], None]:
        run: Callable[[Tensor], Tensor] = torch.compile(model) if compiled else model

        def call() -> None:
            with hardware.autocast(machine.where, machine.precision):
                logits = run(ids)
            F.cross_entropy(logits.flatten(0, 1).float(), ids.flatten()).backward()
            model.zero_grad(set_to_none=True)

        return call

    return {name: step(model) for name, model in models.items()}


@torch.inference_mode()
def _decoding(machine: Machine) -> Calls:
    first = torch.zeros(1, PAST, dtype=torch.long, device=machine.where)

    def token(model: Decoder) -> Callable[[], Any]:
        model = model.to(machine.precision).eval()
        cache = KeyValueCache()
        with torch.inference_mode():
            model(first, cache)
        kept = {layer: (cache.keys[layer], cache.values[layer]) for layer in cache.keys}

        @torch.inference_mode()
        def call() -> None:
            for layer, (keys, values) in kept.items():  # the same past for every token
                cache.keys[layer], cache.values[layer] = keys, values
            model(first[:, :1], cache)

        return call

    return {name: token(model) for name, model in _decoders(machine).items()}


def _compiled(machine: Machine, name: str, found: dict[str, Any], end: float) -> None:
    """Enters compiled steps, of as many residual connections as can be compiled in time."""
    calls: Calls = {}
    for title in RESIDUALS:
        try:
            with limit(end - 15 - time.monotonic()):
                own = _steps(machine, (title,))
                own[title]()
            calls |= own
        except OutOfTime:
            found["left_out"][f"{title}, compiled"] = f"not compiled within {machine.minutes:g} minutes; give --minutes"
        except Exception as error:  # torch.compile fails in many ways where no C++ compiler is
            found["left_out"][f"{title}, compiled"] = f"torch.compile failed: {type(error).__name__}"
    if "PreNorm" in calls and len(calls) > 1:
        found["tables"][name] = _table(calls, machine.where, max(5.0, end - time.monotonic()))
