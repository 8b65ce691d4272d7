"""A corpus folder and a cache that every test has to itself."""

import pytest

from .texts import make_folder


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path / "corpus")
