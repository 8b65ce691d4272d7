"""Which backend runs an op: the choice, its announcement, and the override, in one place.

    reference   plain PyTorch, autograd through everything; any device, any dtype
    eager       gradient written by hand; any device, any dtype; what "auto" takes without a GPU; without gradients,
                in forms of few calls for decoding (`inference`)
    triton      fused kernels on CUDA; bf16, fp16, fp32

"auto" takes triton for CUDA tensors that its kernels support and eager elsewhere; torch.compile traces into it and
fuses it. ATTNRES_BACKEND sets the choice at import.
"""

import importlib.util
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import eager, reference
from . import no_grad as inference

NAMES = ("auto", "reference", "eager", "triton")
MAX_TRITON_WIDTH = 8192
MAX_TRITON_SOURCES = 256
TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
"""Found at import: a compiler that traces a read must not trace the search for a package."""

_log = logging.getLogger("attnres")
_announced: set[str] = set()
_choice = "auto"


def set_backend(name: str) -> None:
    """Chooses the backend of every depth-attention op: "auto", "reference", "eager" or "triton".

    Raises ValueError for an unknown name, or for "triton" where Triton is not installed.
    """
    global _choice
    if name not in NAMES:
        raise ValueError(f"backend must be one of {', '.join(NAMES)}; it is {name!r}")
    if name == "triton" and not TRITON_INSTALLED:
        raise ValueError("backend 'triton' needs Triton, which is not installed; use 'auto' or install triton")
    _choice = name


def backend() -> str:
    """The backend in force, as given to set_backend or ATTNRES_BACKEND."""
    return _choice


@contextmanager
def shapes_only() -> Iterator[None]:
    """Within it the ops compute nothing: they return and keep what the kernels would, for tensors without data."""
    global _choice
    before, _choice = _choice, "shapes"
    try:
        yield
    finally:
        _choice = before


def select(source: Tensor, num_sources: int = 1) -> Any:
    """The backend module that serves a call whose sources look like `source`."""
    name = _choice
    if name == "auto":
        name = _automatic(source, num_sources)
        _announce(name, source)
    return _module(name)


def _automatic(source: Tensor, num_sources: int) -> str:
    if (
        source.is_cuda
        and TRITON_INSTALLED
        and source.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and source.shape[-1] <= MAX_TRITON_WIDTH
        and num_sources <= MAX_TRITON_SOURCES
    ):
        return "triton"
    return "eager"


def _module(name: str) -> ModuleType:
    if name == "triton":
        from .triton import backend as triton

        return triton
    if name == "shapes":
        from . import dry as shapes

        return shapes
    if name == "reference":
        return reference
    return eager if torch.is_grad_enabled() or torch.compiler.is_compiling() else inference


def _announce(name: str, source: Tensor) -> None:
    if torch.compiler.is_compiling() or name in _announced:
        return
    _announced.add(name)
    _log.info("depth attention runs on the %s backend (%s, %s)", name, source.device.type, source.dtype)


set_backend(os.environ.get("ATTNRES_BACKEND", "auto"))
