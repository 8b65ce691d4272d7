"""Attention Residuals for PyTorch: layers that attend over depth instead of summing it (arXiv 2603.15031)."""

from . import model, ops, residual
from .residual import BlockAttnRes, FullAttnRes
from .version import __version__

__all__ = ["BlockAttnRes", "FullAttnRes", "__version__", "model", "ops", "residual"]


def __getattr__(name: str):  # type: ignore[no-untyped-def]
    import importlib

    if name in ("hf", "run", "train", "analysis", "lab"):
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module 'attnres' has no attribute {name!r}")
