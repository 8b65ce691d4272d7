"""attnres eval"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from ..evaluate.tasks import evaluate, table
from ..files import user_path
from . import flags


@dataclass
class EvalFlags:
    """Measure a model: perplexity on a text file, tasks of lm-eval, or both."""

    model: Annotated[str, tyro.conf.Positional]
    """Folder of a run, of a Hugging Face model or of a converted one."""
    tasks: str = ""
    """Tasks of lm-eval, separated by commas; needs the [eval] extra."""
    data: Path | None = None
    """UTF-8 text file whose perplexity is measured."""
    out: Path | None = None
    """Folder for results.json."""
    context: int | None = None
    """Tokens that the model sees at once in --data; the default is its longest context."""
    stride: int | None = None
    """Tokens between windows of --data; the default is half the context."""
    batch_size: int = 8
    """Sequences in one forward pass."""
    limit: int | None = None
    """Examples of each task; the default is all."""
    num_fewshot: int | None = None
    """Worked examples in front of each question; the default is the task's own."""
    include_path: Path | None = None
    """Folder of task definitions of your own."""
    device: str | None = None
    """Device: cpu, cuda, ...; the default is CUDA where there is one."""
    dtype: str = "auto"
    """Dtype of the weights: float32, bfloat16, ...; auto is what they were saved in."""


def run(argv: Sequence[str]) -> int:
    given = flags.parse(EvalFlags, argv, "eval", tyro.MISSING_NONPROP)
    results = evaluate(
        str(user_path(given.model)),
        tasks=[task.strip() for task in given.tasks.split(",") if task.strip()],
        data=given.data,
        out=given.out,
        context=given.context,
        stride=given.stride,
        batch_size=given.batch_size,
        limit=given.limit,
        num_fewshot=given.num_fewshot,
        include_path=given.include_path,
        device=given.device,
        dtype=given.dtype,
    )
    print(table(results))
    return 0
