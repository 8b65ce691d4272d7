"""Looking inside a trained model, and showing what was seen."""

from typing import Any

__all__ = ["mixing_figure", "mixing_matrices", "mixing_matrix", "semiseparable_rank"]


def __getattr__(name: str) -> Any:
    import importlib

    if name in __all__:
        module = "draw.mixing_plot" if name == "mixing_figure" else "measure.mixing"
        return getattr(importlib.import_module(f".{module}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
