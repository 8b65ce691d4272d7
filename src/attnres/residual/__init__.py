"""Residual connections as objects: one mechanism a file, all behind the four verbs of `Residual`, known by name."""

from .attention import DepthAttention
from .base import Residual, State
from .block_attnres import BlockAttnRes
from .full_attnres import FullAttnRes
from .prenorm import PreNorm
from .registry import build, get, names, register

__all__ = [
    "BlockAttnRes",
    "DepthAttention",
    "FullAttnRes",
    "PreNorm",
    "Residual",
    "State",
    "build",
    "get",
    "names",
    "register",
]
