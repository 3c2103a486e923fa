"""A network in memory, for tests of what lies above it: a `wire.transport.Transport` by a clock of its own."""

import fnmatch
import heapq
import itertools
import math
from collections.abc import Callable, Iterable

from common.clock import ManualClock
from wire.transport import Message, Transport

Reaction = Callable[[str, bytes], Iterable[tuple[str, bytes]]]


class MemoryTransport(Transport):
    """Messages go to `react`; what it returns, and what a test `put`s, is received after `latency_s`.

    Waiting takes no time: `receive` advances `clock` to the next message's arrival or to its own deadline. Code under
    test must read the same clock.
    """

    def __init__(
        self, react: Reaction = lambda topic, payload: (), *, clock: ManualClock, latency_s: float = 0.001
    ) -> None:
        self.clock = clock
        self.latency_s = latency_s
        self.sent: list[tuple[str, bytes]] = []
        self.react = react
        self._filters: list[str] = []
        self._coming: list[tuple[int, int, str, bytes, bool]] = []
        self._order = itertools.count()

    def subscribe(self, topic_filter: str, *, qos: int = 0, timeout_s: float = 10.0) -> None:
        self._filters.append(topic_filter.replace("+", "*"))

    def publish(self, topic: str, payload: bytes, *, qos: int = 0, retain: bool = False) -> None:
        self.sent.append((topic, payload))
        for answer_topic, answer in self.react(topic, payload):
            self.put(answer_topic, answer)

    def publish_confirmed(self, topic: str, payload: bytes, *, retain: bool, timeout_s: float = 10.0) -> None:
        self.publish(topic, payload, qos=1, retain=retain)

    def put(self, topic: str, payload: bytes, *, delay_s: float | None = None, retained: bool = False) -> None:
        """Have a message arrive after `delay_s`, by default after the network's latency."""
        if any(fnmatch.fnmatch(topic, f) for f in self._filters):
            due_ns = self.clock.perf_ns() + round(1e9 * (self.latency_s if delay_s is None else delay_s))
            heapq.heappush(self._coming, (due_ns, next(self._order), topic, payload, retained))

    def receive(self, timeout_s: float) -> Message | None:
        until_ns = self.clock.perf_ns() + round(1e9 * timeout_s)
        if not self._coming or self._coming[0][0] > until_ns:
            self.clock.advance_ns(math.ceil(1e9 * max(0.0, timeout_s)))
            return None
        due_ns, _, topic, payload, retained = heapq.heappop(self._coming)
        self.clock.advance_ns(max(0, due_ns - self.clock.perf_ns()))
        return Message(topic, payload, self.clock.perf_ns(), retained)

    def close(self) -> None:
        self._coming.clear()
