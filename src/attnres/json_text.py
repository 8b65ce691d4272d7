"""The one way in for JSON that others wrote: what cannot be used is a ValueError, whatever is wrong with it."""

from __future__ import annotations

import json
from typing import Any

DEEPEST = 200
"""Levels of lists and objects; Python's own limits lie above, and differ between reading, copying and writing."""


def parse(text: str | bytes) -> Any:
    """The value that JSON spells; bytes may be UTF-8, 16 or 32. Raises ValueError for everything else."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError(f"it is nested more than {DEEPEST} levels deep") from None
    opening = ("[", "{") if isinstance(text, str) else (b"[", b"{")
    if sum(map(text.count, opening)) > DEEPEST and _deeper_than(value, DEEPEST):  # type: ignore[arg-type]
        raise ValueError(f"it is nested more than {DEEPEST} levels deep")
    return value


def parse_object(text: str | bytes) -> dict[str, Any]:
    """The object that JSON spells. Raises ValueError for everything else."""
    value = parse(text)
    if not isinstance(value, dict):
        raise ValueError(f"it holds a {type(value).__name__} in the place of an object")
    return value


def _deeper_than(value: Any, levels: int) -> bool:
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(levels):
        parts = (part for node in level for part in (node.values() if isinstance(node, dict) else node))
        level = [part for part in parts if isinstance(part, dict | list)]
    return bool(level)
