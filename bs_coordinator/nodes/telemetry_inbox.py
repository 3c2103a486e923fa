"""Telemetry of the nodes. It is decoded only when it is asked for, so no expert request has to wait for it."""

import time
from collections import Counter, deque
from collections.abc import Mapping
from typing import NamedTuple

from bs_coordinator.nodes.admission import Admission
from wire.errors import FrameError
from wire.telemetry import MAX_TELEMETRY_BYTES, Telemetry, decode_telemetry
from wire.transport import Message

_MOST_WAITING = 4096
"""Samples kept for `drain`; when there are more, the oldest are dropped."""


class ReceivedTelemetry(NamedTuple):
    """A sample of telemetry and when it arrived, by this machine's wall clock and monotonic clock."""

    unix_ns: int
    monotonic_ns: int
    telemetry: Telemetry


class _Raw(NamedTuple):
    node: str
    unix_ns: int
    monotonic_ns: int
    payload: bytes


class TelemetryInbox:
    """The telemetry samples of all nodes.

    Attributes:
        dropped: number of rejected samples, by reason.
    """

    def __init__(self) -> None:
        self.dropped: Counter[str] = Counter()
        self._waiting: deque[_Raw] = deque(maxlen=_MOST_WAITING)
        self._latest: dict[str, _Raw] = {}
        self._admission = Admission("telemetry")

    def put(self, node: str, message: Message) -> None:
        """Take in a message of a node's telemetry topic without decoding it."""
        if message.retained or len(message.payload) > MAX_TELEMETRY_BYTES:
            self.dropped["retained" if message.retained else "length"] += 1
            return
        if refusal := self._admission.refusal(node, message.arrived_ns / 1e9):
            self.dropped[refusal] += 1
            return
        unix_ns = time.time_ns() - (time.perf_counter_ns() - message.arrived_ns)
        raw = _Raw(node, unix_ns, message.arrived_ns, message.payload)
        self._latest[node] = raw
        self._waiting.append(raw)

    def drain(self) -> list[ReceivedTelemetry]:
        """The samples since the last call, in order of arrival; invalid ones are counted in `dropped` and left out."""
        waiting, self._waiting = self._waiting, deque(maxlen=_MOST_WAITING)
        return [sample for raw in waiting if (sample := self._decode(raw))]

    def latest(self) -> Mapping[str, ReceivedTelemetry]:
        """The last sample of each node, by name."""
        return {node: sample for node, raw in sorted(self._latest.items()) if (sample := self._decode(raw))}

    def _decode(self, raw: _Raw) -> ReceivedTelemetry | None:
        try:
            return ReceivedTelemetry(raw.unix_ns, raw.monotonic_ns, decode_telemetry(raw.payload, raw.node))
        except FrameError as error:
            self.dropped[error.reason] += 1
            return None


def describe(telemetry: Telemetry) -> str:
    """One line for an operator: radio, temperature and power; empty if the node measures none of them."""
    radio, thermal, power = telemetry.wifi, telemetry.thermal, telemetry.power
    parts = []
    if radio and telemetry.route in (radio.interface, None):
        parts.append(f"{radio.rssi_dbm} dBm" if radio.connected and radio.rssi_dbm is not None else "Wi-Fi")
        if radio.channel is not None:
            parts.append(f"channel {radio.channel}")
        if radio.up_phy_mbps is not None and radio.down_phy_mbps is not None:
            parts.append(f"{radio.up_phy_mbps:.0f} up, {radio.down_phy_mbps:.0f} down Mbit/s")
        if radio.power_save:
            parts.append("power save on")
        if radio.roams:
            parts.append(f"roamed {radio.roams} times")
    elif telemetry.route:
        parts.append(telemetry.route)
    if thermal.soc_celsius is not None:
        parts.append(f"{thermal.soc_celsius:.0f} °C")
    if thermal.throttling_now:
        parts.append(thermal.throttling_now)
    if power.board_watts is not None:
        parts.append(f"{power.board_watts:.1f} W")
    if power.mode:
        parts.append(f"mode {power.mode}")
    return ", ".join(parts)
