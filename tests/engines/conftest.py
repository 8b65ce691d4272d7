"""Engines that people serve models with, in the environment that `make test-engines` makes."""

import pytest


def pytest_collection_modifyitems(items):
    for item in items:
        if "/tests/engines/" in str(item.path):
            item.add_marker(pytest.mark.engines)
