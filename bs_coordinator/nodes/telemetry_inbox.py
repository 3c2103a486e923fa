"""What nodes told of themselves: kept as it arrived, decoded when somebody asks, so that no answer waits for it."""

import time
from collections import Counter, deque
from collections.abc import Mapping
from typing import NamedTuple

from wire.errors import FrameError
from wire.telemetry import MAX_TELEMETRY_BYTES, Telemetry, decode_telemetry
from wire.transport import Message

_MOST_WAITING = 4096
"""Samples kept for `drain`; older ones make room. At one per second and node nobody who drains loses any."""
_MOST_NODES = 1024


class Arrived(NamedTuple):
    """A sample and when it arrived, by this machine's clocks."""

    unix_ns: int
    monotonic_ns: int
    telemetry: Telemetry


class _Raw(NamedTuple):
    node: str
    unix_ns: int
    monotonic_ns: int
    payload: bytes


class TelemetryInbox:
    """The samples of all nodes.

    Attributes:
        dropped: samples that were refused, by reason.
    """

    def __init__(self) -> None:
        self.dropped: Counter[str] = Counter()
        self._waiting: deque[_Raw] = deque(maxlen=_MOST_WAITING)
        self._latest: dict[str, _Raw] = {}

    def put(self, node: str, message: Message) -> None:
        """Take in a message of a node's telemetry topic; cheap."""
        if message.retained or len(message.payload) > MAX_TELEMETRY_BYTES:
            self.dropped["retained" if message.retained else "length"] += 1
            return
        if len(self._latest) >= _MOST_NODES and node not in self._latest:
            self.dropped["nodes"] += 1
            return
        unix_ns = time.time_ns() - (time.perf_counter_ns() - message.arrived_ns)
        raw = _Raw(node, unix_ns, message.arrived_ns, message.payload)
        self._latest[node] = raw
        self._waiting.append(raw)

    def drain(self) -> list[Arrived]:
        """What arrived since the last call, in that order; what is no valid sample is counted and left out."""
        waiting, self._waiting = self._waiting, deque(maxlen=_MOST_WAITING)
        return [arrived for raw in waiting if (arrived := self._decode(raw))]

    def latest(self) -> Mapping[str, Arrived]:
        """The last sample of each node."""
        return {node: arrived for node, raw in sorted(self._latest.items()) if (arrived := self._decode(raw))}

    def _decode(self, raw: _Raw) -> Arrived | None:
        try:
            return Arrived(raw.unix_ns, raw.monotonic_ns, decode_telemetry(raw.payload, raw.node))
        except FrameError as error:
            self.dropped[error.reason] += 1
            return None


def describe(telemetry: Telemetry) -> str:
    """What an operator looks for first, in one line: radio, heat, power; empty if the node knows none of it."""
    radio, thermal, power = telemetry.wifi, telemetry.thermal, telemetry.power
    said = []
    if radio and telemetry.route in (radio.interface, None):
        said.append(f"{radio.rssi_dbm} dBm" if radio.connected and radio.rssi_dbm is not None else "Wi-Fi")
        if radio.channel is not None:
            said.append(f"channel {radio.channel}")
        if radio.up_phy_mbps is not None and radio.down_phy_mbps is not None:
            said.append(f"{radio.up_phy_mbps:.0f} up, {radio.down_phy_mbps:.0f} down Mbit/s")
        if radio.power_save:
            said.append("power save on")
        if radio.roams:
            said.append(f"roamed {radio.roams} times")
    elif telemetry.route:
        said.append(telemetry.route)
    if thermal.soc_celsius is not None:
        said.append(f"{thermal.soc_celsius:.0f} °C")
    if thermal.throttling_now:
        said.append(thermal.throttling_now)
    if power.board_watts is not None:
        said.append(f"{power.board_watts:.1f} W")
    if power.mode:
        said.append(f"mode {power.mode}")
    return ", ".join(said)
