"""attnres inspect"""

from __future__ import annotations

import math
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..analysis.draw.inspect_page import check_place, numbers, write_inspection
from ..analysis.inspect_model import check_folder, encode, open_model, read_input
from ..analysis.measure.inspect import Inspection, inspect
from ..errors import UsageError
from . import flags
from .fields import POSITIONAL


@dataclass
class InspectFlags:
    """See where the layers of a trained model listen, token by token, and what each source is worth: an HTML page."""

    model: Path = field(metadata=POSITIONAL)
    """Folder of a run of attnres train, or of a native or converted Hugging Face model."""
    text: str | None = None
    """Text that the model reads."""
    data: Path | None = None
    """UTF-8 text file instead; its first tokens are read."""
    tokens: int = 256
    """Most tokens to read."""
    tokenizer: str | None = None
    """Tokenizer: bytes, a tokenizer.json or a folder with one; the default is the model's own."""
    out: Path = Path("inspect.html")
    """Page to write; the numbers go beside it, as JSON."""
    per_read: bool = True
    """Also leave out each source of each layer alone: a part of a forward pass for every cell of the heat map."""
    minutes: float = 5.0
    """Most time to spend on leaving out sources; the page is written before with all that needs none, and says what
    was not measured."""
    device: str = "auto"
    """Device: auto, cpu, cuda, ..."""


def run(argv: Sequence[str]) -> int:
    given = flags.parse("inspect", argv, InspectFlags).make(InspectFlags)
    if given.tokens < 2:
        raise UsageError(f"--tokens must be at least 2; it is {given.tokens}")
    if not 0 < given.minutes < math.inf:
        raise UsageError(f"--minutes must be a positive number; it is {given.minutes}")
    text, name = read_input(given.text, given.data)
    check_folder(given.model)
    check_place(given.out)
    print(f"opening {given.model}", file=sys.stderr, flush=True)
    opened = open_model(given.model, given.tokenizer, given.device)
    ids = encode(opened, text, name, given.tokens, cut=given.data is not None)
    tokens = torch.from_numpy(ids).to(next(opened.model.parameters()).device)

    def write(found: Inspection, minutes: float | None = None) -> str:
        values = numbers(
            found,
            opened.model,
            ids.tolist(),
            opened.tokenizer,
            residual=opened.residual,
            name=str(given.model),
            command=shlex.join(["attnres", "inspect", *argv]),
            minutes=minutes,
        )
        page, data = write_inspection(values, given.out)
        return f"loss {values['mean_loss']:.4f} nats a token over {len(ids) - 1} predictions; wrote {page} and {data}"

    def listened(found: Inspection) -> None:
        print(f"{write(found)}, where each layer listens; now leaving out sources", file=sys.stderr, flush=True)

    options: dict[str, Any] = dict(per_read=given.per_read, minutes=given.minutes)
    found = inspect(opened.model, tokens, **options, listened=listened, progress=_Progress())
    said = write(found, given.minutes)
    sources, of_sources, reads, of_reads = found.measured
    if sources + reads < of_sources + of_reads:
        print(
            f"measured {sources + reads} of {of_sources + of_reads} ablations in {given.minutes:g} minutes; raise "
            "--minutes, read fewer --tokens or pass --no-per-read for all of them",
            file=sys.stderr,
        )
    print(said)
    return 0


class _Progress:
    """A line on stderr, rewritten in a terminal, else every ten seconds."""

    def __init__(self) -> None:
        self.began = self.said = time.monotonic()

    def __call__(self, what: str, done: int, of: int, share: float) -> None:
        now = time.monotonic()
        left = max(0.0, (now - self.began) * (1 / share - 1))
        line = f"{what}: {done} of {of}, about {left:.0f} s left"
        if sys.stderr.isatty():
            print(f"\r{line:<60}", end="\n" if done == of else "", file=sys.stderr, flush=True)
        elif now - self.said > 10 or done == of:
            self.said = now
            print(line, file=sys.stderr, flush=True)
