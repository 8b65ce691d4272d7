"""The options of all residual connections, as flags."""

from __future__ import annotations

import inspect
import re
import typing
from typing import Any

from .. import residual as residuals

OPTION_HELP = r"^ *%s: (.*?)(?=^ *\w+: |\n\n)"  # its entry under "Args:" in a docstring


def residual_options() -> dict[str, tuple[Any, Any, str]]:
    """The name of a residual connection and every option of one: (type, default, help). None leaves an option out."""
    found: dict[str, tuple[Any, Any, str]] = {
        "name": (str, "block_attnres", f"Residual connection: {', '.join(residuals.names())}.")
    }
    kinds: dict[str, Any] = {}
    texts: dict[str, dict[str, list[str]]] = {}
    for name in residuals.names():
        cls = residuals.get(name)
        hints = typing.get_type_hints(cls.__init__)
        for option in inspect.signature(cls.__init__).parameters:
            if option in ("self", "dim", "num_layers"):
                continue
            entry = re.search(OPTION_HELP % option, inspect.getdoc(cls) or "", re.DOTALL | re.MULTILINE)
            kinds.setdefault(option, hints[option])
            texts.setdefault(option, {}).setdefault(" ".join(entry[1].split()) if entry else "", []).append(name)
    for option, kind in kinds.items():
        text = " ".join(f"{text} [{', '.join(names)}]" for text, names in texts[option].items())
        found[option] = (kind | None, None, text)
    return found
