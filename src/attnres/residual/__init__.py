"""Residual connections as objects: one mechanism a file, all behind the four verbs of `Residual`, known by name."""

from .ancre import ANCRe
from .attention import DepthAttention
from .base import Residual, State
from .block_attnres import BlockAttnRes
from .deepnorm import DeepNorm
from .delta import Delta
from .delta_attnres import DeltaAttnRes
from .denseformer import DenseFormer
from .full_attnres import FullAttnRes
from .gated_residual import GatedResidual
from .highway import Highway
from .hyper_connections import HyperConnections
from .keel import Keel
from .laurel import Laurel
from .layerscale import LayerScale
from .lowrank_attnres import LowRankAttnRes
from .mhc import ManifoldHyperConnections
from .mhc_lite import MHCLite
from .muddformer import MUDDFormer
from .multihead_attnres import MultiheadAttnRes
from .prenorm import PreNorm
from .registry import build, get, names, register
from .rezero import ReZero
from .siamesenorm import SiameseNorm
from .watch import watched

__all__ = [
    "ANCRe",
    "BlockAttnRes",
    "DeepNorm",
    "Delta",
    "DeltaAttnRes",
    "DenseFormer",
    "DepthAttention",
    "FullAttnRes",
    "GatedResidual",
    "Highway",
    "HyperConnections",
    "Keel",
    "Laurel",
    "LayerScale",
    "LowRankAttnRes",
    "MHCLite",
    "MUDDFormer",
    "ManifoldHyperConnections",
    "MultiheadAttnRes",
    "PreNorm",
    "ReZero",
    "Residual",
    "SiameseNorm",
    "State",
    "build",
    "get",
    "names",
    "register",
    "watched",
]
