from collections.abc import Iterator
from pathlib import Path

import pytest

from attnres import ops

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the benchmarks, its modules importable."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return BENCHMARKS


@pytest.fixture(autouse=True)
def own_backend() -> Iterator[None]:
    """Benchmarks choose a backend for their process; here that is the process of all tests."""
    before = ops.backend()
    yield
    ops.set_backend(before)
