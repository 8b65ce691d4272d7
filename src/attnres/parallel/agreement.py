"""That the processes of a job were started for the same work."""

from __future__ import annotations

from collections.abc import Mapping

from torch import distributed

from ..errors import UsageError


def require_same(settings: Mapping[str, str]) -> None:
    """Raises UsageError in all processes of the job, naming what differs and where, unless all have equal `settings`.

    Nothing else would notice: processes with other rates or other data exchange tensors of the right shapes, and the
    result is wrong.
    """
    box = [dict(settings)]
    distributed.broadcast_object_list(box)
    first = box[0]
    own = {n: settings.get(n, "absent") for n in {**first, **settings} if settings.get(n) != first.get(n)}
    by_rank: list[dict[str, str]] = [{}] * distributed.get_world_size()
    distributed.all_gather_object(by_rank, own)
    different: dict[str, str] = {}
    for rank, values in enumerate(by_rank):
        for name, value in values.items():
            different.setdefault(name, f"{name} is {first.get(name, 'absent')} in rank 0 and {value} in rank {rank}")
    if different:
        raise UsageError(
            f"the processes of this job disagree: {', '.join(different.values())}; start all of them with the same "
            "settings and the same files"
        )
