"""What the processes of a job do in step: one acts for all, all succeed or all fail, all work for the same run.

Each function is called by every process of the job; in a process that belongs to none it acts for that one alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import distributed

from ..errors import Failure, UsageError

T = TypeVar("T")


def processes() -> int:
    """How many there are in the job."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def rank() -> int:
    """This one's number in the job."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def gathered(value: T) -> list[T]:
    """The values of all processes, by rank. They are pickled on the way."""
    if processes() == 1:
        return [value]
    box: list[Any] = [None] * processes()
    distributed.all_gather_object(box, value)
    return box


def on_all(action: Callable[[], T]) -> T:
    """Runs `action` in every process; where it fails in one, all raise what the first that failed has raised."""
    if processes() == 1:
        return action()
    result, error = _attempt(action)
    for failed in gathered(error):
        if failed is not None:
            raise failed
    return result  # type: ignore[return-value]


def on_first(action: Callable[[], T]) -> T:
    """Runs `action` in the first process only; all return what it returned, or raise what it raised."""
    if processes() == 1:
        return action()
    box: list[Any] = list(_attempt(action)) if rank() == 0 else [None, None]
    distributed.broadcast_object_list(box)
    result, error = box
    if error is not None:
        raise error
    return result


def summed(value: float, device: torch.device) -> float:
    """The sum over all processes."""
    if processes() == 1:
        return value
    total = torch.tensor(value, dtype=torch.float64, device=device)
    distributed.all_reduce(total)
    return total.item()


def require_same(settings: Mapping[str, str]) -> None:
    """Raises UsageError in all processes of the job, naming what differs and where, unless all have equal `settings`.

    Nothing else would notice: processes with other rates or other data exchange tensors of the right shapes, and the
    result is wrong.
    """
    first = on_first(lambda: dict(settings))
    own = {n: settings.get(n, "absent") for n in {**first, **settings} if settings.get(n) != first.get(n)}
    different: dict[str, str] = {}
    for number, values in enumerate(gathered(own)):
        for name, value in values.items():
            different.setdefault(name, f"{name} is {first.get(name, 'absent')} in rank 0 and {value} in rank {number}")
    if different:
        raise UsageError(
            f"the processes of this job disagree: {', '.join(different.values())}; start all of them with the same "
            "settings and the same files"
        )


def _attempt(action: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return action(), None
    except (UsageError, Failure) as error:
        return None, error
    except OSError as error:
        return None, Failure(f"process {rank()} of the job failed: {error}")
