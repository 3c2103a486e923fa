"""Limits of connections that uvicorn does not have: how many there are, and how long a request's head may take."""

import asyncio
import ipaddress
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

MAX_CONNECTIONS = 256
"""Below the usual limit of 1024 open files, at which no connection can be accepted any more."""
MAX_PER_ADDRESS = 64
HEAD_S = 10.0


class LimitedProtocol(H11Protocol):
    """Limits connections in all and of one address, and the time that a request's head takes to arrive.

    A connection beyond a limit takes the place of the one that has been without a request for longest, since clients
    that hold connections without asking anything must not lock out others. If all have requests, the new one is closed.
    """

    max_connections = MAX_CONNECTIONS
    max_per_address = MAX_PER_ADDRESS
    head_s = HEAD_S

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head_timer: asyncio.TimerHandle | None = None
        self._since_s = 0.0
        self._address = ""
        self._aborted = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Count the connection."""
        super().connection_made(transport)
        self._since_s = self.loop.time()
        self._address = _network(self.client[0] if self.client else "")
        others = [c for c in self.connections if isinstance(c, LimitedProtocol) and c is not self and not c._aborted]
        same = [other for other in others if other._address == self._address]
        if len(same) >= self.max_per_address:
            self._make_room(same)
        elif len(others) >= self.max_connections:
            self._make_room(others)
        if not self._aborted:
            self._watch_head()

    def data_received(self, data: bytes) -> None:
        """Take in data, and watch the time while it is a part of a head."""
        super().data_received(data)
        self._since_s = self.loop.time()
        self._watch_head()

    @property
    def _has_request(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _make_room(self, others: list["LimitedProtocol"]) -> None:
        waiting = [other for other in others if not other._has_request]
        min(waiting, key=lambda other: other._since_s, default=self)._abort()

    def _abort(self) -> None:
        self._aborted = True
        self.transport.abort()

    def _watch_head(self) -> None:
        if not self._has_request:
            self._head_timer = self._head_timer or self.loop.call_later(self.head_s, self.transport.abort)
        elif self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None


def _network(address: str) -> str:
    """What counts as one address: of IPv6 the first 64 bits, since one machine may have all the others."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if ip.version == 4:
        return address
    return str(ip.ipv4_mapped or ipaddress.ip_network((int(ip), 64), strict=False))
