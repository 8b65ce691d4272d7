"""Which backend runs an op: the choice, its announcement, and the override, in one place.

    reference   plain PyTorch, autograd through everything; any device, any dtype
    eager       gradient written by hand; any device, any dtype; without gradients, in forms of few calls for decoding
                (`no_grad`)
    native      C for CPUs, compiled at first use; bf16, fp16, fp32, fp64
    triton      fused kernels on CUDA; bf16, fp16, fp32

"auto" takes triton for CUDA tensors that its kernels support, native for CPU tensors where there is a C compiler, and
eager elsewhere; torch.compile traces into that and fuses it. A program of torch.export gets eager on every device, so
that it runs without this package. ATTNRES_BACKEND sets the choice at import.
"""

import importlib.util
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..version import IN_FOLDER
from .backend import Backend
from .dry import Dry
from .eager import Eager
from .exporting import is_exporting
from .no_grad import NoGrad
from .reference import Reference

NAMES = ("auto", "reference", "eager", "native", "triton")
# found at import: a compiler that traces a read must not trace the search for a package
TRITON_INSTALLED = not IN_FOLDER and importlib.util.find_spec("triton") is not None
if not IN_FOLDER:  # a model's folder carries the formulas alone
    from .native.backend import NATIVE

_REFERENCE, _EAGER, _NO_GRAD, _DRY = Reference(), Eager(), NoGrad(), Dry()
_log = logging.getLogger("attnres")
_announced: set[str] = set()
_choice: str | Backend = "auto"


def set_backend(name: str | Backend) -> None:
    """Chooses the backend of every depth-attention op: "auto", "reference", "eager", "native", "triton", or your own.

    Raises ValueError for an unknown name, or for "triton" where Triton is not installed.
    """
    global _choice
    if not isinstance(name, Backend) and name not in NAMES:
        raise ValueError(f"backend must be one of {', '.join(NAMES)}; it is {name!r}")
    if name == "triton" and not TRITON_INSTALLED:
        raise ValueError("backend 'triton' needs Triton, which is not installed; use 'auto' or install triton")
    if name == "native" and IN_FOLDER:
        raise ValueError("backend 'native' needs an installed attnres; this code came with a model; use 'auto'")
    _choice = name


def backend() -> str | Backend:
    """The backend in force, as given to set_backend or ATTNRES_BACKEND."""
    return _choice


@contextmanager
def shapes_only() -> Iterator[None]:
    """Within it the ops compute nothing: they return and keep what the kernels would, for tensors without data."""
    global _choice
    before, _choice = _choice, "dry"
    try:
        yield
    finally:
        _choice = before


def select(source: Tensor, num_sources: int = 1, query: Tensor | None = None) -> Backend:
    """The backend that serves a call with so many sources like `source`.

    query: of a single read, which the formulas serve if it is of a part of the width and the backend takes none such.
    Raises ValueError with its reason if one was chosen by name and declines.
    """
    if _choice == "auto":
        chosen = _automatic(source, num_sources)
    else:
        chosen = _named(_choice)
        if reason := chosen.declines(source, num_sources):
            raise ValueError(reason)
    if query is None or chosen.takes_slices or query.shape == source.shape[-1:]:
        return chosen
    return _REFERENCE


def _automatic(source: Tensor, num_sources: int) -> Backend:
    name, reason = "eager", None
    if source.is_cuda and not is_exporting():
        reason = _named("triton").declines(source, num_sources) if TRITON_INSTALLED else "Triton is not installed"
        name = "eager" if reason else "triton"
    elif source.is_cpu and not IN_FOLDER and not torch.compiler.is_compiling():
        reason = NATIVE.declines(source, num_sources)
        name = "eager" if reason else "native"
    _announce(name, source, reason)
    return _named(name)


def _named(name: str | Backend) -> Backend:
    if isinstance(name, Backend):
        return name
    if name == "triton":
        from .triton.backend import TRITON

        return TRITON
    if name == "native":
        return NATIVE
    if name == "dry":
        return _DRY
    if name == "reference":
        return _REFERENCE
    return _EAGER if torch.is_grad_enabled() or torch.compiler.is_compiling() else _NO_GRAD


def _announce(name: str, source: Tensor, reason: str | None = None) -> None:
    """Once a backend, and once a reason why the call did not get the faster one."""
    if torch.compiler.is_compiling() or (reason or name) in _announced:
        return
    _announced.add(reason or name)
    why = f": {reason}" if reason else f" ({source.device.type}, {source.dtype})"
    _log.info("depth attention runs on the %s backend%s", name, why)


set_backend(os.environ.get("ATTNRES_BACKEND", "auto"))
