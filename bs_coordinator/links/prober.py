"""Pings that keep the estimates fresh and prove that a node is back: what `LinkMonitor` and `Health` ask for, sent."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

from bs_coordinator.health import Health
from bs_coordinator.links.estimator import LinkSample
from bs_coordinator.links.monitor import LinkMonitor
from wire.frames import PingFrame, PongFrame, RequestId
from wire.transport import Message

_PING_TIMEOUT_S = 10.0
_PROOF_BYTES = 64


class _Ping(NamedTuple):
    node: str
    sent_ns: int
    down_bytes: int
    expires_s: float
    proves: bool


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

    def probe(self, nodes: Iterable[str], now_s: float) -> None:
        """Send what is due to nodes that are online. Cheap when nothing is."""
        for node in self._health.to_prove(now_s):
            if node in nodes:
                self._ping(node, _PROOF_BYTES, _PROOF_BYTES, now_s, proves=True)
        probe = self._links.next_probe([node for node in nodes if self._health.usable(node)], now_s)
        if probe is not None:
            self._ping(probe.node, probe.down_bytes, probe.up_bytes, now_s, proves=False)

    def take(self, frame: PongFrame, node: str, message: Message) -> bool:
        """Take in an answer from `node`; False if no such ping is under way."""
        ping = self._pings.get(frame.id)
        if ping is None or node != ping.node:
            return False
        del self._pings[frame.id]
        if ping.proves:
            self._health.proven(node)
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

    def _ping(self, node: str, down_bytes: int, up_bytes: int, now_s: float, *, proves: bool) -> None:
        for id in [id for id, ping in self._pings.items() if ping.expires_s < now_s]:
            del self._pings[id]
        id = self._new_id()
        length, sent_ns = self._send(node, PingFrame(id, bytes(down_bytes), up_bytes))
        self._pings[id] = _Ping(node, sent_ns, length, now_s + _PING_TIMEOUT_S, proves)
