"""Pings that keep the estimates fresh and prove that a node is back: what `LinkMonitor` and `Health` ask for, sent."""

import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import NamedTuple

from bs_coordinator.clocks import ClockSample
from bs_coordinator.health import Health
from bs_coordinator.links.estimator import LinkSample
from bs_coordinator.links.monitor import LinkMonitor
from wire.clock import STAMP_BYTES, read_stamps
from wire.frames import PingFrame, PongFrame, RequestId
from wire.transport import Message

_PING_TIMEOUT_S = 10.0
_PROOF_BYTES = 64
_MOST_CLOCK_SAMPLES = 1 << 16


class _Ping(NamedTuple):
    node: str
    sent_ns: int
    down_bytes: int
    expires_s: float
    proves: bool
    for_clock: bool
    sent_unix_ns: int


class Prober:
    """Pings under way."""

    def __init__(
        self,
        links: LinkMonitor,
        health: Health,
        send: Callable[[str, PingFrame], tuple[int, int]],
        new_id: Callable[[], RequestId],
    ) -> None:
        """Nothing is sent yet.

        Args:
            send: publishes a frame to a node; its length in bytes and `time.perf_counter_ns()` just before.
        """
        self._links = links
        self._health = health
        self._send = send
        self._new_id = new_id
        self._pings: dict[RequestId, _Ping] = {}
        self._clocks: deque[ClockSample] = deque(maxlen=_MOST_CLOCK_SAMPLES)

    def probe(self, nodes: Iterable[str], now_s: float) -> None:
        """Send what is due to nodes that are online. Cheap when nothing is."""
        for node in self._health.to_prove(now_s):
            if node in nodes:
                self._ping(node, _PROOF_BYTES, _PROOF_BYTES, now_s, proves=True)
        probe = self._links.next_probe([node for node in nodes if self._health.usable(node)], now_s)
        if probe is not None:
            self._ping(probe.node, probe.down_bytes, probe.up_bytes, now_s)

    def ask_clocks(self, nodes: Iterable[str], now_s: float) -> None:
        """Ask nodes what time it is. Links are not judged by it: a node may be at work meanwhile."""
        for node in nodes:
            self._ping(node, 0, STAMP_BYTES, now_s, for_clock=True)

    def take_clocks(self) -> list[ClockSample]:
        """What nodes' clocks showed since the last call; every answer that is long enough tells."""
        taken, self._clocks = list(self._clocks), deque(maxlen=_MOST_CLOCK_SAMPLES)
        return taken

    def take(self, frame: PongFrame, node: str, message: Message) -> bool:
        """Take in an answer from `node`; False if no such ping is under way."""
        ping = self._pings.get(frame.id)
        if ping is None or node != ping.node:
            return False
        del self._pings[frame.id]
        if ping.proves:
            self._health.proven(node)
        if (stamps := read_stamps(frame.payload)) is not None:
            # Our clock may be set meanwhile: the way back is measured by the steady one.
            arrived_unix_ns = ping.sent_unix_ns + message.arrived_ns - ping.sent_ns
            self._clocks.append(ClockSample(node, ping.sent_unix_ns, *stamps, arrived_unix_ns))
        if ping.for_clock:
            return True
        sample = LinkSample(
            time_s=message.arrived_ns / 1e9,
            node=node,
            down_bytes=ping.down_bytes,
            up_bytes=len(message.payload),
            round_trip_s=(message.arrived_ns - ping.sent_ns) / 1e9,
            node_s=frame.durations.total_ns / 1e9,
        )
        self._links.observe([sample])
        return True

    def _ping(
        self, node: str, down_bytes: int, up_bytes: int, now_s: float, *, proves: bool = False, for_clock: bool = False
    ) -> None:
        for id in [id for id, ping in self._pings.items() if ping.expires_s < now_s]:
            del self._pings[id]
        id = self._new_id()
        length, sent_ns = self._send(node, PingFrame(id, bytes(down_bytes), up_bytes))
        sent_unix_ns = time.time_ns() - (time.perf_counter_ns() - sent_ns)
        self._pings[id] = _Ping(node, sent_ns, length, now_s + _PING_TIMEOUT_S, proves, for_clock, sent_unix_ns)
