"""Before anything is trained: is the converted model the same function, and do both keep packed sequences apart?"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import Failure
from ..hf.convert.folder import TOLERANCE, convert_and_compare
from ..run import hardware
from .config import UpgradeConfig
from .models import open_plain

LENGTH = 8
"""Tokens of a packed sequence that is looked at."""


@dataclass(frozen=True)
class Proof:
    upgrade: UpgradeConfig

    @property
    def out(self) -> Path:
        return self.upgrade.out / "runs" / "proof"


def prove(proof: Proof) -> dict[str, Any]:
    """Converts the model to each residual connection, in float32.

    Returns {"packed": whether all models keep packed sequences apart, "conversions": by residual connection, what
    `convert_and_compare` finds}. Raises UsageError for a model that cannot be converted, Failure for one that computes
    something else.
    """
    config = proof.upgrade
    proof.out.mkdir(parents=True, exist_ok=True)
    device = hardware.find_device(config.device)
    packed, found = True, {}
    for entry in config.residual:
        model = open_plain(config.model).to(device).eval()
        packed = packed and keeps_apart(model)
        name, options = config.conversion(entry)
        found[entry] = convert_and_compare(model, name, options)
        if not found[entry]["relative_difference"] <= TOLERANCE:
            raise Failure(
                f"the model converted to {entry} computes something else (relative difference "
                f"{found[entry]['relative_difference']:.3g}, allowed {TOLERANCE:g}); nothing was trained"
            )
        packed = packed and keeps_apart(model)
    return {"packed": packed, "conversions": found}


@torch.no_grad()
def keeps_apart(model: Any) -> bool:
    """Whether a sequence that is packed behind another in a row, by positions that start anew, computes what it does
    alone."""
    generator = torch.Generator().manual_seed(0)
    row = torch.randint(model.config.get_text_config().vocab_size, (1, 2 * LENGTH), generator=generator)
    row = row.to(model.device)
    positions = torch.arange(LENGTH, device=model.device).repeat(2)[None]
    alone = model(row[:, LENGTH:], use_cache=False).logits
    try:
        behind = model(row, position_ids=positions, use_cache=False).logits[:, LENGTH:]
    except (TypeError, ValueError):  # it takes no positions, or refuses them
        return False
    return bool((behind - alone).abs().max() <= TOLERANCE * alone.abs().max())
