"""Decoder-only language models over any residual connection."""

from .config import DecoderConfig, DecoderShape
from .decoder import Decoder
from .presets import preset, presets

__all__ = ["Decoder", "DecoderConfig", "DecoderShape", "preset", "presets"]
