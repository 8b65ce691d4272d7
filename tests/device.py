"""The device of the tests that run on a GPU where there is one; all others name the CPU."""

import os

import pytest
import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
needs_gpu = pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a GPU")

if DEVICE.type == "cpu":  # before anything imports triton: its kernels run on the CPU then
    os.environ.setdefault("TRITON_INTERPRET", "1")
