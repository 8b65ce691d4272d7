"""Decoder-only language models over any residual connection."""

from .config import DecoderConfig, DecoderShape, preset, presets
from .decoder import Decoder

__all__ = ["Decoder", "DecoderConfig", "DecoderShape", "preset", "presets"]
