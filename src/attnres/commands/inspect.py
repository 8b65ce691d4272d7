"""attnres inspect"""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

from ..analysis.inspect import inspect
from ..analysis.inspect_model import check_folder, encode, open_model, read_input
from ..analysis.inspect_page import check_place, numbers, write_inspection
from ..errors import UsageError
from . import flags


@dataclass
class InspectFlags:
    """See where the layers of a trained model listen, token by token, and what each source is worth: an HTML page."""

    model: Annotated[Path, tyro.conf.Positional]
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
    device: str = "auto"
    """Device: auto, cpu, cuda, ..."""


def run(argv: Sequence[str]) -> int:
    given = flags.parse(InspectFlags, argv, "inspect", tyro.MISSING_NONPROP)
    if given.tokens < 2:
        raise UsageError(f"--tokens must be at least 2; it is {given.tokens}")
    text, name = read_input(given.text, given.data)
    check_folder(given.model)
    check_place(given.out)
    print(f"opening {given.model}", file=sys.stderr, flush=True)
    opened = open_model(given.model, given.tokenizer, given.device)
    ids = encode(opened, text, name, given.tokens, cut=given.data is not None)
    tokens = torch.from_numpy(ids).to(next(opened.model.parameters()).device)
    found = inspect(opened.model, tokens, per_read=given.per_read, progress=_Progress())
    values = numbers(
        found,
        opened.model,
        ids.tolist(),
        opened.tokenizer,
        residual=opened.residual,
        name=str(given.model),
        command=shlex.join(["attnres", "inspect", *argv]),
    )
    page, data = write_inspection(values, given.out)
    print(f"loss {values['mean_loss']:.4f} nats a token over {len(ids) - 1} predictions; wrote {page} and {data}")
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
