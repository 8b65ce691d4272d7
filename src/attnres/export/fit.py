"""What Kimi K3's architecture can say of our models; the rest is refused, each part by its name."""

from __future__ import annotations

from ..errors import UsageError
from ..model import DecoderConfig
from ..residual import Residual
from ..residual.mechanisms.block_attnres import BlockAttnRes


def fit(config: DecoderConfig, residual: Residual) -> int:
    """The decoder layers in a block, as Kimi K3 counts them. Raises UsageError for what its architecture has not."""
    if not isinstance(residual, BlockAttnRes):
        raise UsageError(
            f"Kimi K3's residual connection is Block AttnRes, and the model's is {config.residual}; "
            "export one that was trained with --residual.name block_attnres"
        )
    _check_weights(residual)
    _check_layers(config)
    return _block_size(config, residual)


def _check_weights(residual: BlockAttnRes) -> None:
    # a temperature is none of these: it goes into the queries
    weighing = residual.weighing
    switches = {
        "query": (weighing.query, "learned"),
        "mixing": (weighing.mixing, "softmax"),
        "key_normalised": (weighing.key_normalised, True),
        "heads": (weighing.heads, 1),
        "null_source": (weighing.null_source, False),
        "reads": (residual.reads, "layer"),
    }
    for name, (value, published) in switches.items():
        if value != published:
            raise UsageError(
                f"Kimi K3 has no {name} of Block AttnRes other than {published!r}, and the model's is {value!r}; "
                f"export one that was trained without --residual.{name.replace('_', '-')}"
            )


def _check_layers(config: DecoderConfig) -> None:
    for kind in config.attention_kinds:
        if kind not in ("kda", "mla"):
            raise UsageError(
                f"Kimi K3's attention is kda and mla, without rotary positions, and the model has {kind} layers; "
                "export one whose --model.attention-pattern names those two alone"
            )
    if "kda" in config.attention_kinds and config.linear_num_heads != config.num_attention_heads:
        raise UsageError(
            f"Kimi K3 has as many heads in kda layers as in mla layers, and the model has linear_num_heads "
            f"{config.linear_num_heads} and num_attention_heads {config.num_attention_heads}; export one without "
            "--model.linear-num-heads"
        )
    if config.feed_forward != "swiglu":
        raise UsageError(
            f"Kimi K3's MLPs are gated, and the model's are {config.feed_forward}; export one whose feed_forward is "
            "swiglu"
        )


def _block_size(config: DecoderConfig, residual: BlockAttnRes) -> int:
    starts = residual.block_starts
    size = starts[1] if len(starts) > 1 else config.num_layers
    if starts != tuple(range(0, config.num_layers, size)):
        last = config.num_layers - starts[-1]
        raise UsageError(
            f"Kimi K3's blocks are of one size, but for a shorter last one, and the model's are of {size} layers and "
            f"the last of {last}; export one that was trained with --residual.block-size, or a number of blocks that "
            f"divides its {config.num_layers} layers"
        )
    if size % 2:
        raise UsageError(
            f"Kimi K3's blocks end behind an MLP, and the model's have {size} layers, which ends some behind an "
            "attention; export one that was trained with an even --residual.block-size"
        )
    return size // 2
