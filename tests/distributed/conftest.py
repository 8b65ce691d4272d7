"""Processes that all distributed tests share."""

from collections.abc import Callable, Iterator

import pytest
import torch

from .processes import World


@pytest.fixture(scope="package")
def world() -> Iterator[Callable[[int], World]]:
    """world(4).run(function, *args) -> what the function returned in each of four processes."""
    worlds: dict[int, World] = {}
    yield lambda size: worlds.setdefault(size, World(size))
    for opened in worlds.values():
        opened.close()


@pytest.fixture
def newer_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A version that is trusted with every schedule, for what is planned and not run."""
    monkeypatch.setattr(torch, "__version__", "2.13.0")
