"""A network in memory, for tests of what lies above it: `wire.transport.Transport` in thirty lines."""

import collections
import fnmatch
import time
from collections.abc import Callable, Iterable

from wire.transport import Message

Reaction = Callable[[str, bytes], Iterable[tuple[str, bytes]]]


class MemoryTransport:
    """Messages go to `react`; what it returns, and what a test puts into `inbox`, is received."""

    def __init__(self, react: Reaction = lambda topic, payload: ()) -> None:
        self.inbox: collections.deque[Message] = collections.deque()
        self.sent: list[tuple[str, bytes]] = []
        self._filters: list[str] = []
        self._react = react

    def subscribe(self, topic_filter: str, *, qos: int = 0) -> None:
        self._filters.append(topic_filter.replace("+", "*"))

    def publish(self, topic: str, payload: bytes, *, qos: int = 0, retain: bool = False) -> None:
        self.sent.append((topic, payload))
        for answer_topic, answer in self._react(topic, payload):
            self.put(answer_topic, answer)

    def put(self, topic: str, payload: bytes) -> None:
        if any(fnmatch.fnmatch(topic, f) for f in self._filters):
            self.inbox.append(Message(topic, payload, time.perf_counter_ns()))

    def receive(self, timeout_s: float) -> Message | None:
        if self.inbox:
            return self.inbox.popleft()
        time.sleep(min(timeout_s, 0.01))
        return None

    def close(self) -> None:
        self.inbox.clear()
