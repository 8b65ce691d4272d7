"""attnres train"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..model import DecoderShape
from ..train.config import RunConfig
from ..train.trainer import read_config, train
from . import flags

ResidualFlags: Any = flags.residual_flags(with_name=True)


@dataclass
class TrainFlags(RunConfig):
    """Train one language model; Ctrl-C or SIGTERM saves a checkpoint, --resume goes on from it."""

    resume: bool = False
    """Go on with the run in --out; its saved settings are the defaults."""
    config: Path | None = None
    """YAML file with any of these settings; flags win over it."""
    preset: str | None = None
    """Shape to start from: tiny, small, medium."""
    model: DecoderShape = field(default_factory=DecoderShape)
    """Shape of the model."""
    residual: ResidualFlags = field(default_factory=ResidualFlags)
    """Residual connection and its options."""


def run(argv: Sequence[str]) -> int:
    early = flags.peek(argv, "config", "preset", "out")
    values = flags.read_yaml(early["config"])
    if "--resume" in argv:
        saved = read_config(Path(early["out"] or RunConfig.out)).to_dict()
        model = saved.pop("model")
        options = {"name": model.pop("residual"), **model.pop("residual_options")}
        values = {**saved, "model": model, **values}
        values.setdefault("residual", options)
    residual = ResidualFlags(**{k.replace("-", "_"): v for k, v in values.pop("residual", {}).items()})
    default = flags.run_defaults(TrainFlags, values, early["preset"], residual=residual)
    given = flags.parse(TrainFlags, argv, "train", default)
    config = flags.train_config(given, given.model, given.residual.name, flags.chosen_options(given.residual))
    result = train(config, given.resume)
    if result.finished:
        print(f"validation loss {result.val_loss:.4f} after {result.tokens:,} tokens; saved in {config.out}")
        print(f"next: attnres generate {config.out} --prompt 'def '", file=sys.stderr)
    return 0
