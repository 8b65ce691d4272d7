"""attnres export"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ..export import export_model
from . import flags
from .fields import POSITIONAL


@dataclass
class ExportFlags:
    """Write a trained model for other programs: engines that know Kimi K3's checkpoints, or llama.cpp."""

    model: Path = field(metadata=POSITIONAL)
    """Folder of a run, a checkpoint in it, or a native Hugging Face folder."""
    out: Path = field(metadata=POSITIONAL)
    """What to write, a folder or a GGUF file; must not exist yet."""
    outtype: Literal["f32", "f16", "bf16", "q8_0"] | None = None
    """Type of the matrices of a GGUF file; the default is f16."""
    to: Literal["kimi-k3", "gguf"] = field(kw_only=True)
    """Layout: a folder as Kimi K3's checkpoints, or a GGUF file."""


def run(argv: Sequence[str]) -> int:
    given = flags.parse("export", argv, ExportFlags).make(ExportFlags)
    result = export_model(
        given.model,
        given.out,
        given.to,
        outtype=given.outtype,
        report=lambda line: print(line, file=sys.stderr, flush=True),
    )
    print(
        f"{result['parameters']:,} parameters in {result['layers']} layers, blocks of {result['block_size']}, as "
        f"{given.to}: {result['bytes']:,} bytes in {given.out}"
    )
    return 0
