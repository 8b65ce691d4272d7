"""Connections of which a slow one holds no place that another needs."""

import asyncio
import itertools
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

_births = itertools.count()


class Connection(H11Protocol):
    """Where there are too many connections, a new one closes one that waits for its client: the oldest whose request
    has not come whole, else the oldest that has had its answer.

    uvicorn lets a client take any time over its request, and its own limit counts idle connections, and closed ones for
    a while; so the limit is kept here and uvicorn has none.
    """

    dropped = False
    limit_concurrency: int | None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.birth = next(_births)
        everyone: Any = self.connections
        present = [c for c in everyone if not c.dropped]  # uvicorn forgets closed ones later
        idle = [c for c in present if c is not self and c._is_waited_for()]
        limit, self.limit_concurrency = self.limit_concurrency, None
        if limit is None or len(present) < limit:
            return
        if not idle:
            self.limit_concurrency = 0  # uvicorn answers its request with 503 and closes it
            return
        oldest = min(idle, key=lambda c: (c.cycle is not None and c.cycle.response_complete, c.birth))
        oldest.dropped = True
        oldest.transport.abort()

    def _is_waited_for(self) -> bool:
        """Whether the client is to act next: it has not sent its request, or does not take the end of its answer."""
        request = self.cycle
        return request is None or request.more_body or request.response_complete or self.transport.is_closing()
