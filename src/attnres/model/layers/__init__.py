"""One kind of layer a file: attention kinds and feed-forward kinds. Their names in a config:"""

from ..layer import Layer, register
from .experts import MixtureOfExperts
from .feed_forward import FeedForward
from .gqa import Attention
from .kda import KimiDeltaAttention
from .latent import MultiHeadLatentAttention
from .sliding_window import SlidingWindowAttention

register("gqa")(Attention)
register("mla")(MultiHeadLatentAttention)
register("kda")(KimiDeltaAttention)
register("sliding_window")(SlidingWindowAttention)
register("swiglu")(FeedForward)
register("experts")(MixtureOfExperts)

__all__ = ["Layer", "register"]
