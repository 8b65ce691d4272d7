"""attnres convert"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..hf.convert.folder import convert_folder
from . import flags
from .fields import POSITIONAL


@dataclass
class ConvertFlags:
    """Turn a pretrained Hugging Face model into an AttnRes model that computes the same, ready to be trained on."""

    src: Path = field(metadata=POSITIONAL)
    """Folder of the model: config.json and safetensors weights. Or a GGUF file, whose weights are dequantised."""
    dst: Path = field(metadata=POSITIONAL)
    """Folder to write; must not exist yet, or be empty."""
    residual: str = "block_attnres"
    """Residual connection of the result: block_attnres or full_attnres."""
    num_blocks: int | None = None
    """Blocks of Block AttnRes; the default is 8, or fewer in a shallow model."""
    block_size: int | None = None
    """Layers in a block instead of num_blocks; every attention and every MLP is one layer."""


def run(argv: Sequence[str]) -> int:
    given = flags.parse("convert", argv, ConvertFlags).make(ConvertFlags)
    result = convert_folder(
        given.src,
        given.dst,
        given.residual,
        given.num_blocks,
        block_size=given.block_size,
        report=lambda line: print(line, file=sys.stderr, flush=True),
    )
    print(
        f"{result['architecture']} -> {result['residual']}, {result['num_layers']} layers: "
        f"{result['parameters_added']:,} parameters added to {result['parameters_before']:,}; saved in {given.dst}"
    )
    return 0
