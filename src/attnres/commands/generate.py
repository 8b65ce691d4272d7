"""attnres generate"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

from ..data.tokenizer import load_tokenizer_from
from ..errors import UsageError
from ..model import Decoder
from ..model.generate import generate
from ..parallel import inference, mesh
from ..parallel.agreement import require_same
from ..parallel.config import ParallelConfig
from ..run import hardware
from ..run.config import flat
from ..run.folder import load_run
from . import flags


@dataclass
class GenerateFlags:
    """Continue a text with a model that `attnres train` made. Under torchrun its processes share the model: each has a
    part of every matrix."""

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
    prefill_chunk: int | None = None
    """Read the prompt so many tokens at a time, which bounds the memory of a long one; the default reads it at once."""
    device: str = "auto"
    """Device: auto, cpu, cuda, ..."""


def run(argv: Sequence[str]) -> int:
    given = flags.parse(GenerateFlags, argv, "generate", tyro.MISSING_NONPROP)
    with _loaded(given) as (model, is_first):
        tokenizer = load_tokenizer_from(given.run)
        if tokenizer.vocab_size > model.config.vocab_size:
            raise UsageError(
                f"{given.run / 'tokenizer.json'} knows {tokenizer.vocab_size} tokens and the model "
                f"{model.config.vocab_size}; put the run's own tokenizer.json back"
            )
        text = given.prompt.encode("utf-8", "surrogateescape")  # bytes that are no text in the terminal's encoding
        prompt = torch.tensor(tokenizer.encode(text).astype("int64"), device=model.embed_tokens.weight.device)
        ids = generate(
            model,
            prompt,
            given.tokens,
            temperature=given.temperature,
            top_k=given.top_k,
            seed=given.seed,
            end=tokenizer.end_of_document,
            prefill_chunk=given.prefill_chunk,
        )
        continued = tokenizer.decode([*prompt.tolist(), *ids])
        if is_first:
            sys.stdout.write(continued + "\n")
    return 0


@contextmanager
def _loaded(given: GenerateFlags) -> Iterator[tuple[Decoder, bool]]:
    """A run's model, split over the processes that torchrun started, and whether this is the first of them."""
    processes = mesh.launched_processes()
    if processes == 1:
        yield load_run(given.run, given.device)[0], True
        return
    split = ParallelConfig(tp=processes)
    model, config = load_run(given.run, "cpu")
    split.check(processes, model.config, batch_size=1, context=processes)
    where = hardware.find_device(given.device)
    with mesh.connected(split, where):
        asked = {name: value for name, value in asdict(given).items() if name not in ("run", "device")}
        require_same(flat({**asked, "run": config.curve()}))
        joined = mesh.build(split, where)
        inference.apply(model, joined["tp"])
        yield model.to(where), joined.get_rank() == 0
