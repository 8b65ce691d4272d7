"""attnres eval"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..evaluate.tasks import evaluate, table
from . import flags
from .fields import POSITIONAL


@dataclass
class EvalFlags:
    """Measure a model: perplexity on a text file, tasks of lm-eval, or both."""

    model: Path = field(metadata=POSITIONAL)
    """Folder of a run, of a Hugging Face model or of a converted one."""
    tasks: tuple[str, ...] = ()
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
    given = flags.parse("eval", argv, EvalFlags).make(EvalFlags)
    print(table(evaluate(**{**vars(given), "model": str(given.model)})))
    return 0
