"""Pings: they keep link estimates fresh, prove that a node that was left out works again, and read nodes' clocks.

`LinkMonitor` and `Health` decide which pings are due; this module sends them and matches the answers.
"""

from collections import deque
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field

from bs_coordinator.dispatch.health import Health
from bs_coordinator.links.estimator import LinkSample
from bs_coordinator.links.monitor import LinkMonitor
from bs_coordinator.links.packet_train import dispersion_s
from bs_coordinator.links.probes import Probe
from bs_coordinator.nodes.clock_offsets import ClockSample
from common.clock import Clock
from wire.frames import PingFrame, PongFrame, RequestId
from wire.pong_stamps import STAMP_BYTES, read_stamps
from wire.transport import Message

_PING_EVERY_S = 0.1
"""At least this long between two pings of all nodes."""
_PING_TIMEOUT_S = 10.0
_MOST_CLOCK_SAMPLES = 1 << 16


@dataclass(slots=True)
class _Ping:
    """One ping or packet train under way.

    Attributes:
        for_clock: only the node's clock is of interest.
        first_sent_ns, sent_ns: when its first and its last message were sent.
        down_bytes: length of the frame.
        arrivals: of a train's answers so far, in seconds by `Clock.perf_ns`, and whether each is exact.
    """

    probe: Probe
    expires_s: float
    for_clock: bool
    first_sent_ns: int = 0
    sent_ns: int = 0
    sent_unix_ns: int = 0
    down_bytes: int = 0
    arrivals: list[tuple[float, bool]] = field(default_factory=list)


class Prober:
    """The pings under way."""

    def __init__(
        self,
        links: LinkMonitor,
        health: Health,
        send: Callable[[str, PingFrame], tuple[int, int]],
        new_id: Callable[[], RequestId],
        *,
        clock: Clock,
    ) -> None:
        """Nothing is sent yet.

        Args:
            send: publishes a frame to a node, and gives its length in bytes and `Clock.perf_ns` just before.
            new_id: makes the id of the next request.
        """
        self._links = links
        self._health = health
        self._send = send
        self._new_id = new_id
        self._clock = clock
        self._pings: dict[RequestId, _Ping] = {}
        self._clocks: deque[ClockSample] = deque(maxlen=_MOST_CLOCK_SAMPLES)
        self._next_ping_s = 0.0

    def probe(self, nodes: Collection[str], now_s: float) -> None:
        """Send the pings that are due to `nodes`. Cheap when none is."""
        self.prove(nodes, now_s)
        probe = self._links.next_probe([node for node in nodes if self._health.usable(node)], now_s)
        if probe is not None:
            self._start(probe, now_s)

    def ping(self, nodes: Iterable[str], now_s: float) -> None:
        """Ping all `nodes` that are usable, whatever the budget says. Cheap if just done.

        The answers show the links as they are now, and whether the network works at all.
        """
        if now_s >= self._next_ping_s:
            self._next_ping_s = now_s + _PING_EVERY_S
            for node in nodes:
                if self._health.usable(node):
                    self._ping(node, now_s)

    def prove(self, nodes: Collection[str], now_s: float) -> None:
        """Ping those of `nodes` that are left out and whose pause is over. Cheap when there are none."""
        for node in self._health.to_prove(now_s):
            if node in nodes:
                self._ping(node, now_s)

    def ask_clocks(self, nodes: Iterable[str], now_s: float) -> None:
        """Ask nodes for the time, as far as the budget of probes allows it.

        Links are not estimated from the answers: a node may be computing meanwhile.
        """
        for node in nodes:
            probe = Probe(node, 0, STAMP_BYTES)
            if self._links.spend(probe, now_s):
                self._start(probe, now_s, for_clock=True)

    def take_clocks(self) -> list[ClockSample]:
        """What nodes' clocks showed since the last call: one sample per single ping with room for time stamps."""
        taken, self._clocks = list(self._clocks), deque(maxlen=_MOST_CLOCK_SAMPLES)
        return taken

    def take(self, frame: PongFrame, node: str, message: Message, *, sure: bool) -> bool:
        """Take in an answer from `node`; False if no such ping is under way.

        Args:
            sure: the message's arrival time is exact.
        """
        ping = self._pings.get(frame.id)
        if ping is None or node != ping.probe.node or len(frame.payload) != ping.probe.up_bytes:
            return False
        del self._pings[frame.id]
        self._links.count_probe(node, up_bytes=len(message.payload))
        self._health.proven(node, ping.sent_ns / 1e9)
        if ping.probe.count == 1 and (stamps := read_stamps(frame.payload)) is not None:
            # The wall clock may be set meanwhile, so the round trip is measured by the monotonic one.
            arrived_unix_ns = ping.sent_unix_ns + message.arrived_ns - ping.sent_ns
            self._clocks.append(ClockSample(node, ping.sent_unix_ns, *stamps, arrived_unix_ns))
        if ping.for_clock:
            return True
        ping.arrivals.append((message.arrived_ns / 1e9, sure))
        if len(ping.arrivals) == ping.probe.count:
            sample = _sample(ping, frame, message) if ping.probe.count > 1 or sure else None
            if sample:
                self._links.observe([sample])
            else:
                self._links.answered(node)
        return True

    def _ping(self, node: str, now_s: float) -> None:
        # Whether a node may be used must not wait for the budget. These pings are few, and others make room for them.
        probe = Probe(node, 0, 0)
        self._links.spend(probe, now_s, anyway=True)
        self._start(probe, now_s)

    def _start(self, probe: Probe, now_s: float, *, for_clock: bool = False) -> None:
        for id in [id for id, ping in self._pings.items() if ping.expires_s < now_s]:
            del self._pings[id]
        ping = _Ping(probe, now_s + _PING_TIMEOUT_S, for_clock)
        for _ in range(probe.count):
            id = self._new_id()
            frame = PingFrame(id, bytes(probe.down_bytes), probe.up_bytes)
            ping.down_bytes, ping.sent_ns = self._send(probe.node, frame)
            ping.first_sent_ns = ping.first_sent_ns or ping.sent_ns
            self._links.count_probe(probe.node, down_bytes=ping.down_bytes)
            self._pings[id] = ping
        ping.sent_unix_ns = self._clock.unix_ns() - (self._clock.perf_ns() - ping.sent_ns)


def _sample(ping: _Ping, frame: PongFrame, message: Message) -> LinkSample | None:
    probe = ping.probe
    if probe.count == 1:
        return LinkSample(
            time_s=message.arrived_ns / 1e9,
            node=probe.node,
            down_bytes=ping.down_bytes,
            up_bytes=len(message.payload),
            round_trip_s=(message.arrived_ns - ping.sent_ns) / 1e9,
            node_s=frame.durations.total_ns / 1e9,
        )
    found = dispersion_s(ping.arrivals, probe.lead)
    if found is None:
        return None
    gaps, total_s = found
    return LinkSample(
        time_s=message.arrived_ns / 1e9,
        node=probe.node,
        down_bytes=gaps * ping.down_bytes if probe.down_bytes else 0,
        up_bytes=gaps * len(message.payload) if probe.up_bytes else 0,
        round_trip_s=total_s,
        node_s=0.0,
        train=True,
        train_bytes=probe.count * (ping.down_bytes if probe.down_bytes else len(message.payload)),
        train_s=(message.arrived_ns - ping.first_sent_ns) / 1e9,
    )
