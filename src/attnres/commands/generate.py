"""attnres generate"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError
from ..model import Decoder
from ..model.generate import check_sampling, generate
from ..parallel import inference, mesh
from ..parallel.agreement import require_same
from ..parallel.config import ParallelConfig
from ..run import hardware
from ..run.config import flat
from ..run.opening import Opened
from ..run.opening import open as open_model
from . import flags
from .fields import POSITIONAL


@dataclass
class GenerateFlags:
    """Continue a text with a model that `attnres train` or `attnres convert` made. Under torchrun its processes share
    the model: each has a part of every matrix."""

    run: Path = field(metadata=POSITIONAL)
    """Folder of a run, of a checkpoint in it, or of a native or converted Hugging Face model."""
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
    given = flags.parse("generate", argv, GenerateFlags).make(GenerateFlags)
    processes = mesh.launched_processes()
    opened = open_model(given.run, device=given.device if processes == 1 else "cpu")
    if opened.kind == "native":
        opened = opened._replace(model=opened.model.to_decoder().eval())
    text = given.prompt.encode("utf-8", "surrogateescape")  # bytes that are no text in the terminal's encoding
    prompt = torch.tensor(opened.tokenizer.encode(text).astype("int64"))
    with _over_processes(given, opened, processes) as (model, is_first):
        prompt = prompt.to(next(model.parameters()).device)
        end = opened.tokenizer.end_of_document
        continued = opened.tokenizer.decode([*prompt.tolist(), *_continuation(model, prompt, given, end)])
        if is_first:
            sys.stdout.write(continued + "\n")
    return 0


def _continuation(model: Any, prompt: Tensor, given: GenerateFlags, end: int) -> Iterable[int]:
    if isinstance(model, Decoder):
        return generate(
            model,
            prompt,
            given.tokens,
            temperature=given.temperature,
            top_k=given.top_k,
            seed=given.seed,
            end=end,
            prefill_chunk=given.prefill_chunk,
        )
    check_sampling(
        prompt,
        given.tokens,
        model.config.max_position_embeddings,
        given.temperature,
        given.top_k,
        given.seed,
        given.prefill_chunk,
    )
    sampling = {"temperature": given.temperature, "top_k": given.top_k or 0} if given.temperature else {}
    torch.manual_seed(given.seed)
    ids = model.generate(
        prompt[None],
        attention_mask=torch.ones_like(prompt[None]),
        max_new_tokens=given.tokens,
        do_sample=bool(given.temperature),
        prefill_chunk_size=given.prefill_chunk,
        pad_token_id=end,
        **sampling,
    )[0]
    return [token for token in ids[len(prompt) :].tolist() if token != end]


@contextmanager
def _over_processes(given: GenerateFlags, opened: Opened, processes: int) -> Iterator[tuple[Any, bool]]:
    """The model, split over the processes that torchrun started, and whether this is the first of them."""
    if processes == 1:
        yield opened.model, True
        return
    model = opened.model
    if not isinstance(model, Decoder):
        raise UsageError(f"{given.run} holds a converted model, which works in one process; start it without torchrun")
    split = ParallelConfig(tp=processes)
    split.check(processes, model.config, batch_size=1, context=processes)
    where = hardware.find_device(given.device)
    with mesh.connected(split, where):
        asked = {name: value for name, value in asdict(given).items() if name not in ("run", "device")}
        require_same(flat({**asked, "run": model.config.to_dict()}))
        joined = mesh.build(split, where)
        inference.apply(model, joined["tp"])
        yield model.to(where), joined.get_rank() == 0
