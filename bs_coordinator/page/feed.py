"""Server-sent events for the viewers of the live page: bounded, and never waited for by the answers."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import msgspec

from bs_coordinator.page.documents import Snapshot

MAX_VIEWERS = 16
_WAITING_SNAPSHOTS = 16
"""A viewer that is this many snapshots behind is dropped; its page connects again."""
_HEARTBEAT_S = 5.0
_HEARTBEAT = b": nothing new\n\n"


class Viewer:
    """One open page.

    Attributes:
        events: that it has not read yet; None is the end.
        began: it has got a whole snapshot, so that it can use those that hold only what is new.
    """

    def __init__(self, waiting: int) -> None:
        """Nothing is sent yet.

        Args:
            waiting: events that may wait for a slow viewer.
        """
        self.events: asyncio.Queue[bytes | None] = asyncio.Queue(waiting)
        self.began = False

    def end(self) -> None:
        """Make the end of the stream the next event."""
        while not self.events.empty():
            self.events.get_nowait()
        self.events.put_nowait(None)


class LiveFeed:
    """Sends each snapshot to all viewers.

    `publish`, `viewers` and `take_newcomers` are for the answers thread, all else for the event loop.
    """

    def __init__(
        self, *, max_viewers: int = MAX_VIEWERS, waiting: int = _WAITING_SNAPSHOTS, heartbeat_s: float = _HEARTBEAT_S
    ) -> None:
        """A feed without viewers.

        Args:
            max_viewers: viewers at once.
            waiting: snapshots that may wait for one viewer.
            heartbeat_s: after so long without a snapshot a comment is sent, so that both ends see that they live.
        """
        self._max_viewers = max_viewers
        self._waiting = waiting
        self._heartbeat_s = heartbeat_s
        self._viewers: list[Viewer] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._newcomers = False
        self._closed = False

    @property
    def viewers(self) -> int:
        """Number of viewers."""
        return len(self._viewers)

    def take_newcomers(self) -> bool:
        """Whether viewers have joined since the last call, who need a whole snapshot."""
        newcomers, self._newcomers = self._newcomers, False
        return newcomers

    def publish(self, snapshot: Snapshot) -> None:
        """Send a snapshot to all viewers. Returns at once; a viewer that is too far behind is dropped."""
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the viewers are gone
                self._loop.call_soon_threadsafe(self._spread, snapshot)

    def join(self) -> Viewer | None:
        """Add a viewer; None if there are too many, or the server is being stopped. `leave` must follow."""
        if self._closed or len(self._viewers) >= self._max_viewers:
            return None
        self._loop = asyncio.get_running_loop()
        viewer = Viewer(self._waiting)
        self._newcomers = True
        self._viewers.append(viewer)
        return viewer

    def leave(self, viewer: Viewer) -> None:
        """Remove a viewer; nothing happens if it was dropped."""
        self._viewers = [other for other in self._viewers if other is not viewer]

    async def events(self, viewer: Viewer) -> AsyncIterator[bytes]:
        """The events for a viewer, until it is dropped or the server is stopped."""
        yield _HEARTBEAT  # headers and a first byte at once: proxies and pages see that the stream works
        while True:
            try:
                async with asyncio.timeout(self._heartbeat_s):
                    event = await viewer.events.get()
            except TimeoutError:
                event = _HEARTBEAT
            if event is None:
                return
            yield event

    def close(self) -> None:
        """End all streams, and let no more viewers in."""
        self._closed = True
        for viewer in self._viewers:
            viewer.end()
        self._viewers = []

    def _spread(self, snapshot: Snapshot) -> None:
        event = b"data: " + msgspec.json.encode(snapshot) + b"\n\n"
        for viewer in list(self._viewers):
            viewer.began |= snapshot.model is not None
            if not viewer.began:
                continue
            try:
                viewer.events.put_nowait(event)
            except asyncio.QueueFull:
                self.leave(viewer)
                viewer.end()
