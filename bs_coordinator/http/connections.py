"""Limits of connections that uvicorn does not have: how many there are, and how long a request's head may take."""

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

MAX_CONNECTIONS = 256
"""Below the usual limit of 1024 open files, at which no connection can be accepted any more."""
HEAD_S = 10.0


class LimitedProtocol(H11Protocol):
    """Closes connections beyond `max_connections`, and those whose head takes longer than `head_s` to arrive."""

    max_connections = MAX_CONNECTIONS
    head_s = HEAD_S

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Count the connection."""
        super().connection_made(transport)
        if len(self.connections) > self.max_connections:
            transport.abort()
        else:
            self._watch_head()

    def data_received(self, data: bytes) -> None:
        """Take in data, and watch the time while it is a part of a head."""
        super().data_received(data)
        self._watch_head()

    def _watch_head(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self._head_timer = self._head_timer or self.loop.call_later(self.head_s, self.transport.abort)
        elif self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
