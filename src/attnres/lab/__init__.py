"""Experiments: runs as data, results as JSON, figures from results."""

from typing import Any

__all__ = ["PowerLaw", "bootstrap", "compute_advantage", "fit_power_law", "interval"]


def __getattr__(name: str) -> Any:
    import importlib

    if name in __all__:
        return getattr(importlib.import_module(".power_law", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
