"""Whether this machine can compile the native backend."""

import pytest
import torch

from attnres.ops.native import build

COMPILED = not isinstance(build.library(torch.float64), str)


def require_native():
    """Skips a test where the backend cannot be compiled."""
    if not COMPILED:
        pytest.skip(f"{build.library(torch.float64)}")
