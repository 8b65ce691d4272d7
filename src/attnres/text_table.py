"""Tables as text, for terminals and Markdown."""

from __future__ import annotations

from collections.abc import Sequence


def columns(rows: Sequence[Sequence[str]], left: int = 0) -> list[str]:
    """A line for each row of equally many cells: the first `left` columns flush left, the others flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = ["<" if i < left else ">" for i in range(len(widths))]
    return ["  ".join(map(_padded, row, sides, widths)).rstrip() for row in rows]


def _padded(cell: str, side: str, width: int) -> str:
    return f"{cell:{side}{width}}"


def markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table; the first row is its head."""
    head, *body = ["| " + " | ".join(row) + " |" for row in rows]
    return [head, "|---" * len(rows[0]) + "|", *body]
