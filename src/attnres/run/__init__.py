"""What a run is on disk: its configuration, folder, checkpoints, and the model inside.

`attnres.run.open(path)` opens any trained model.
"""

from typing import Any


def __getattr__(name: str) -> Any:
    if name not in ("Opened", "open"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import opening  # with all that reading a model takes

    return getattr(opening, name)
