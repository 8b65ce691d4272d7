"""What it looks like from inside when another process of a job is gone."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from torch import distributed

from ..errors import Failure


@contextmanager
def telling_lost_contact(timeout: int) -> Iterator[None]:
    """Turns what torch says when another process is gone into a Failure."""
    try:
        yield
    except RuntimeError as error:
        if (lost := _lost_contact(error)) is None:
            raise
        raise Failure(
            f"lost contact with another process of the job, or had no answer from it for {timeout} s "
            f"(--parallel.timeout); look for the first error above, then go on with --resume ({lost})"
        ) from error


def _lost_contact(error: BaseException | None) -> str | None:
    """What torch says of a process that is gone or silent; None if that is not what the error is about."""
    signs = ("onnection closed", "onnection reset", "imed out", "timeout", "roken pipe", "NCCL")
    while error is not None:
        text = str(error).strip()
        if isinstance(error, distributed.DistError) or any(sign in text for sign in signs):
            return re.sub(r"^\[\S+\] ", "", text.partition("\n")[0]).partition(". ")[0][:200]
        error = error.__cause__  # a pipeline stage says only which of its passes failed
    return None
