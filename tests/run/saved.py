"""Checkpoints whose tensors and state all hold their step, so that one that mixes two saves is found out."""

import os
from pathlib import Path

import torch

from attnres.run.checkpoint import load, save

FILES = ("model.safetensors", "optimizer.safetensors", "state.json")


def save_number(root: Path, step: int, keep: int = 10) -> Path:
    """A checkpoint in which every tensor and the state hold the step."""
    tensor = torch.full((64,), float(step))
    return save(root, step, {"w": tensor}, {"adamw": {"w": {"exp_avg": tensor.clone()}}}, {"number": step}, keep)


def assert_number(path: Path, step: int) -> None:
    model, optimizer, state, loaded_step = load(path)
    assert torch.equal(model["w"], torch.full((64,), float(step)))
    assert torch.equal(optimizer["adamw"]["w"]["exp_avg"], model["w"])
    assert (state, loaded_step) == ({"number": step}, step)


def names(root: Path) -> list[str]:
    return sorted(os.listdir(root))


def assert_same(left, right) -> None:
    """Equal in value, type, dtype and every bit (NaN included)."""
    assert type(left) is type(right)
    if isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype and left.shape == right.shape
        assert left.contiguous().flatten().view(torch.uint8).equal(right.contiguous().flatten().view(torch.uint8))
    elif isinstance(left, dict):
        assert list(left) == list(right)
        for (key, value), (other_key, other) in zip(left.items(), right.items(), strict=True):
            assert type(key) is type(other_key)
            assert_same(value, other)
    elif isinstance(left, list | tuple):
        assert len(left) == len(right)
        for value, other in zip(left, right, strict=True):
            assert_same(value, other)
    else:
        assert repr(left) == repr(right)
