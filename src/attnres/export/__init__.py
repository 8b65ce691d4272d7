"""Models of this package in layouts that other programs read: Kimi K3's checkpoints, llama.cpp's GGUF files."""

from .door import FORMATS, export_model

__all__ = ["FORMATS", "export_model"]
