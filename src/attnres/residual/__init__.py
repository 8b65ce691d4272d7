"""Residual connections as objects: one mechanism a file, all behind the four verbs of `Residual`, known by name."""

from .base import Residual, State
from .depth_attention import DepthAttention
from .mechanisms.ancre import ANCRe
from .mechanisms.block_attnres import BlockAttnRes
from .mechanisms.deep_delta import Delta
from .mechanisms.deepnorm import DeepNorm
from .mechanisms.delta_attnres import DeltaAttnRes
from .mechanisms.denseformer import DenseFormer
from .mechanisms.full_attnres import FullAttnRes
from .mechanisms.gated_residual import GatedResidual
from .mechanisms.highway import Highway
from .mechanisms.hyper_connections import HyperConnections
from .mechanisms.keel import Keel
from .mechanisms.laurel import Laurel
from .mechanisms.layerscale import LayerScale
from .mechanisms.lowrank_attnres import LowRankAttnRes
from .mechanisms.mhc import ManifoldHyperConnections
from .mechanisms.mhc_lite import MHCLite
from .mechanisms.muddformer import MUDDFormer
from .mechanisms.multihead_attnres import MultiheadAttnRes
from .mechanisms.prenorm import PreNorm
from .mechanisms.rezero import ReZero
from .mechanisms.siamesenorm import SiameseNorm
from .mechanisms.x0_lambdas import X0Lambdas
from .registry import build, get, named, names, register
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
    "X0Lambdas",
    "build",
    "get",
    "named",
    "names",
    "register",
    "watched",
]
