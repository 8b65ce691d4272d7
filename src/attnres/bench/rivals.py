"""Every public implementation of depth attention that is installed, behind one signature.

    read(query [D], sources, key_norm [D], eps, norm) -> x          one read and the RMSNorm that follows
    inter_block(queries [S, D], sources, key_norms, eps) -> (outs, lses or None)        phase 1, where a rival has it
    merge(query, partial, key_norm, out, lse, eps) -> h                                 phase 2, where a rival has it

`sources` is a list of [..., D]; `norm` is (weight [D], eps) or None. An adapter does what its package leaves to the
caller (stacking, folding the key norm into the query, the norm that follows) and nothing else.

    pip install --no-deps fla-core liger-kernel flash-attn-res fast-attnres && pip install einops packaging

fast-attnres installs a package that is called attnres, as this library is: run the benchmarks with PYTHONPATH=src.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops import Norm
from ..residual import BlockAttnRes, DepthAttention, Residual

Read = Callable[[Tensor, Sequence[Tensor], Tensor, float, Norm | None], Tensor]


@dataclass(frozen=True)
class Rival:
    """`path` runs a whole residual path by itself: (embedding, pseudo-queries, layers, block_size, eps) -> h."""

    name: str
    read: Read | None = None
    inter_block: Callable[..., Any] | None = None
    merge: Callable[..., Tensor] | None = None
    path: Callable[..., Tensor] | None = None


def load(device: torch.device) -> tuple[dict[str, Rival], dict[str, str]]:
    """(rivals by name, why others are not among them)."""
    found, missing = {"straightforward": STRAIGHTFORWARD}, {}
    for name, loader in LOADERS.items():
        try:
            version = importlib.metadata.version(PACKAGES[name])
            if device.type != "cuda":
                raise RuntimeError(f"{PACKAGES[name]} {version} needs a CUDA device")
            found[name] = loader()
        except importlib.metadata.PackageNotFoundError:
            missing[name] = f"{PACKAGES[name]} is not installed"
        except Exception as error:
            missing[name] = f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
    return found, missing


def package(variant: str) -> str | None:
    """The package that a variant is of, None for what is in this file or this library."""
    return PACKAGES.get(variant.split(", ")[0])


def versions(found: dict[str, Rival]) -> dict[str, str | None]:
    return {name: importlib.metadata.version(PACKAGES[name]) for name in found if name in PACKAGES}


def rms_norm(h: Tensor, norm: Norm | None) -> Tensor:
    if norm is None:
        return h
    weight, eps = norm
    return F.rms_norm(h, h.shape[-1:], None if weight is None else weight.to(h.dtype), eps)


# The paper's pseudocode


def straightforward(
    query: Tensor, sources: Sequence[Tensor], key_norm: Tensor, eps: float, norm: Norm | None
) -> Tensor:
    """Stack the sources, normalise the keys, softmax, weighted sum."""
    values = torch.stack(list(sources))
    keys = F.rms_norm(values, values.shape[-1:], key_norm.to(values.dtype), eps)
    weights = torch.einsum("d,n...d->n...", query.to(values.dtype), keys).softmax(0)
    return rms_norm(torch.einsum("n...,n...d->...d", weights, values), norm)


STRAIGHTFORWARD = Rival("straightforward", straightforward)


# flash-linear-attention 0.6: one fused read, the norm that follows included


def fla(gluon: bool) -> Rival:
    from fla.ops.attnres import fused_attnres

    if gluon:  # the package falls back to Triton without a word
        from fla.ops.attnres.backends import AttnResGluonBackend

        assert AttnResGluonBackend().is_available(), "this Triton has no Gluon"

    @torch.compiler.disable  # the package's own choice of backend is
    def read(query: Tensor, sources: Sequence[Tensor], key_norm: Tensor, eps: float, norm: Norm | None) -> Tensor:
        os.environ["FLA_ATTNRES_GLUON"] = str(int(gluon))
        weight, norm_eps = norm or (None, eps)
        if norm_eps != eps:  # its kernel knows one eps
            return rms_norm(fused_attnres(query, sources, key_norm, rms_eps=eps), norm)
        return fused_attnres(query, sources, key_norm, weight, rms_eps=eps)

    return Rival("fla Gluon" if gluon else "fla Triton", read)


# liger-kernel 0.8: one fused read over a stacked tensor


def liger() -> Rival:
    from liger_kernel.ops.attn_res import LigerAttnResFunction

    def read(query: Tensor, sources: Sequence[Tensor], key_norm: Tensor, eps: float, norm: Norm | None) -> Tensor:
        return rms_norm(LigerAttnResFunction.apply(torch.stack(list(sources)), query, key_norm, eps), norm)

    return Rival("liger-kernel", read)


# flash-attn-res 0.1: two phases over a bank of blocks, and a whole path as one autograd function


def flash_attn_res() -> Rival:
    _import_flash_attn_res()
    from flash_attn_res import phase_1_batched_attention_triton_op as phase_1
    from flash_attn_res import phase_2_online_softmax_merge_triton_op as phase_2
    from flash_attn_res.experimental.autograd import BlockAttentionResiduals

    def rows(tensor: Tensor) -> Tensor:
        return tensor.reshape(1, -1, tensor.shape[-1])

    def inter_block(
        queries: Tensor, sources: Sequence[Tensor] | Tensor, key_norms: Tensor, eps: float
    ) -> tuple[list[Tensor], list[Tensor]]:
        """`sources` may be the bank itself, [n, ..., D]."""
        bank = sources if isinstance(sources, Tensor) else torch.stack(list(sources))
        shape = bank.shape[1:]
        outs, lses = phase_1(bank.reshape(len(bank), 1, -1, shape[-1]), queries * key_norms, eps)
        # unbind, not indexing: each index would fill a bank of zeros in backward
        return [o.view(shape) for o in outs.unbind(0)], [lse.view(shape[:-1]) for lse in lses.unbind(0)]

    def merge(query: Tensor, partial: Tensor, key_norm: Tensor, out: Tensor, lse: Tensor, eps: float) -> Tensor:
        return phase_2(rows(partial), query * key_norm, rows(out), lse.reshape(1, -1), eps).view(partial.shape)

    def path(embedding: Tensor, queries: Tensor, layers: Sequence[nn.Module], block_size: int, eps: float) -> Tensor:
        parameters = [p for layer in layers for p in layer.parameters()]
        return BlockAttentionResiduals.apply(rows(embedding), queries, layers, block_size, eps, *parameters).view(
            embedding.shape
        )

    return Rival("flash-attn-res", None, inter_block, merge, path)


def _import_flash_attn_res() -> None:
    """Its phase-2 autotuner names keys that are no arguments of the kernel; recent Triton refuses them."""
    import triton

    autotune = triton.autotune

    def forgiving(configs: Any, key: list[str], **options: Any) -> Callable[[Any], Any]:
        return lambda fn: autotune(configs, [k for k in key if k in fn.arg_names], **options)(fn)

    triton.autotune = forgiving
    try:
        importlib.import_module("flash_attn_res")
    finally:
        triton.autotune = autotune


# fast-attnres 2: one fused read in bf16; many queries at once, without the log-sum-exps that a merge needs


def fast_attnres() -> Rival:
    package = _import_fast_attnres()

    def read(query: Tensor, sources: Sequence[Tensor], key_norm: Tensor, eps: float, norm: Norm | None) -> Tensor:
        return rms_norm(package.attnres(list(sources), (query * key_norm).bfloat16(), eps=eps), norm)

    def inter_block(
        queries: Tensor, sources: Sequence[Tensor] | Tensor, key_norms: Tensor, eps: float
    ) -> tuple[list[Tensor], None]:
        bank = sources if isinstance(sources, Tensor) else list(sources)
        return list(package.attnres_multi(bank, (queries * key_norms).bfloat16(), eps=eps).unbind(0)), None

    return Rival("fast-attnres", read, inter_block)


def _import_fast_attnres() -> ModuleType:
    """Loads it under a name of its own."""
    init = importlib.metadata.distribution("fast-attnres").locate_file("attnres/__init__.py")
    folder = os.path.dirname(str(init))
    spec = importlib.util.spec_from_file_location("fast_attnres", str(init), submodule_search_locations=[folder])
    assert spec is not None and spec.loader is not None
    module = sys.modules["fast_attnres"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PACKAGES = {
    "fla Triton": "fla-core",
    "flash-attn-res": "flash-attn-res",
    "fla Gluon": "fla-core",
    "fast-attnres": "fast-attnres",
    "liger-kernel": "liger-kernel",
}
LOADERS: dict[str, Callable[[], Rival]] = {
    "fla Triton": lambda: fla(gluon=False),
    "flash-attn-res": flash_attn_res,
    "fla Gluon": lambda: fla(gluon=True),
    "fast-attnres": fast_attnres,
    "liger-kernel": liger,
}


# A rival in the place of this library's op


class PluggedState(NamedTuple):
    """sources: the embedding and the finished blocks; partial: the present block's sum; outs, lses: phase 1's results
    for the layers of the present block that have not read yet (a rival in two phases only)."""

    sources: tuple[Tensor, ...]
    partial: Tensor | None = None
    outs: tuple[Tensor, ...] = ()
    lses: tuple[Tensor, ...] = ()


class Plugged(Residual):
    """Block or Full AttnRes by a rival's kernels: what a user of that package would write. Full AttnRes has blocks of
    one layer. Reads are not scaled by their number of sources: the norm that follows would undo it."""

    def __init__(self, residual: DepthAttention, rival: Rival) -> None:
        super().__init__(residual.dim, residual.num_layers)
        self.rival, self.eps = rival, residual.eps
        self.pseudo_query = nn.Parameter(residual.pseudo_query.detach().clone())
        self.key_norm = nn.Parameter(residual.key_norm.detach().clone())
        starts = residual.block_starts if isinstance(residual, BlockAttnRes) else range(self.num_layers)
        self.block_ends = dict(zip(starts, [*starts[1:], self.num_layers], strict=True))

    def start(self, embedding: Tensor) -> PluggedState:
        return PluggedState((embedding,))

    def read(self, state: PluggedState, layer: int, norm: nn.Module | None = None) -> tuple[Tensor, PluggedState]:
        assert isinstance(norm, nn.RMSNorm) and norm.eps is not None
        pair = (norm.weight, norm.eps)
        if layer in self.block_ends or layer == self.num_layers:
            state = PluggedState(self.latest_sources(state))
            end = self.block_ends.get(layer, layer)
            if self.rival.read is None and len(state.sources) > 1 and end > layer + 1:
                return self._open_block(state, layer, end, pair)
        if state.outs:
            return self._merge(state, layer, pair)
        sources = self.latest_sources(state)
        query, key_norm = self.pseudo_query[layer], self.key_norm[layer]
        if len(sources) == 1:
            return rms_norm(sources[0], pair), state
        if self.rival.read is not None:
            return self.rival.read(query, sources, key_norm, self.eps, pair), state
        assert self.rival.inter_block is not None
        (h,), _ = self.rival.inter_block(query[None], sources, key_norm[None], self.eps)
        return rms_norm(h, pair), state

    def write(self, state: PluggedState, layer: int, output: Tensor) -> PluggedState:
        return state._replace(partial=output if state.partial is None else state.partial + output)

    def latest(self, state: PluggedState) -> Tensor:
        return self.latest_sources(state)[-1]

    def finish(self, state: PluggedState, norm: nn.Module | None = None) -> Tensor:
        return self.read(state, self.num_layers, norm)[0]

    def latest_sources(self, state: PluggedState) -> tuple[Tensor, ...]:
        return state.sources if state.partial is None else (*state.sources, state.partial)

    def _open_block(self, state: PluggedState, layer: int, end: int, norm: Norm) -> tuple[Tensor, PluggedState]:
        assert self.rival.inter_block is not None
        rows = slice(layer, end)
        outs, lses = self.rival.inter_block(self.pseudo_query[rows], state.sources, self.key_norm[rows], self.eps)
        return rms_norm(outs[0], norm), state._replace(outs=tuple(outs[1:]), lses=tuple(lses[1:]))

    def _merge(self, state: PluggedState, layer: int, norm: Norm) -> tuple[Tensor, PluggedState]:
        assert self.rival.merge is not None and state.partial is not None
        query, key_norm = self.pseudo_query[layer], self.key_norm[layer]
        h = self.rival.merge(query, state.partial, key_norm, state.outs[0], state.lses[0], self.eps)
        return rms_norm(h, norm), state._replace(outs=state.outs[1:], lses=state.lses[1:])


def plug(residual: DepthAttention, rival: Rival) -> Plugged:
    """A Full or Block AttnRes with the same parameters, in copies of its own, whose reads are the rival's."""
    return Plugged(residual, rival)
