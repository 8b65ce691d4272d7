"""attnres generate"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

from ..model.generate import generate
from ..train.run_folder import load_run
from ..train.tokenizer import load_tokenizer_from
from . import flags


@dataclass
class GenerateFlags:
    """Continue a text with a model that `attnres train` made."""

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of the run."""
    prompt: str = "def "
    """Text to continue."""
    tokens: int = 200
    """Most tokens to add."""
    temperature: float = 0.8
    """Randomness: 0 takes the likeliest token, 1 draws as the model says."""
    top_k: int | None = None
    """Draw from that many likeliest tokens only."""
    seed: int = 0
    """Seed of the draws."""
    device: str = "auto"
    """Device: auto, cpu, cuda, ..."""


def run(argv: Sequence[str]) -> int:
    given = flags.parse(GenerateFlags, argv, "generate", tyro.MISSING_NONPROP)
    model, _ = load_run(given.run, given.device)
    tokenizer = load_tokenizer_from(given.run)
    prompt = torch.tensor(tokenizer.encode(given.prompt).astype("int64"), device=model.embed_tokens.weight.device)
    ids = generate(
        model,
        prompt,
        given.tokens,
        temperature=given.temperature,
        top_k=given.top_k,
        seed=given.seed,
        end=tokenizer.end_of_document,
    )
    text = tokenizer.decode([*prompt.tolist(), *ids])
    sys.stdout.write(text + "\n")
    return 0
