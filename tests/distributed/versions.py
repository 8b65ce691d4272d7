"""What the installed torch is trusted with."""

import torch

from attnres.parallel.config import SPLIT_BACKWARD

SPLITS_BACKWARD = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)
"""Older ones are refused for schedules that split the backward pass (`parallel.config`)."""

V_SHAPED = "ZBVZeroBubble" if SPLITS_BACKWARD else "Interleaved1F1B"
"""A schedule for two stages in a process, the second of which comes back where it can."""


def trusted(schedule: str) -> bool:
    """Whether runs may take a pipeline schedule."""
    return SPLITS_BACKWARD or schedule not in SPLIT_BACKWARD
