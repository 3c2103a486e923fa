"""Judges nodes by the facts that were gathered about them. Pure.

A check without the facts it needs is `unknown` and fails nothing: missing tools and sensors are not faults.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from statistics import median
from typing import Literal

from bs_coordinator.links.estimator import rate_known
from bs_coordinator.nodes.clock_offsets import Offset
from testbed.keys.validity import RENEWAL_DAYS
from testbed.plan.limits import RunLimits
from wire.status import DeviceFacts, NodeStatus
from wire.telemetry import Telemetry, Wifi

Level = Literal["pass", "warn", "fail", "unknown"]
_SPARE_RAM_BYTES = 64 << 20
"""Free memory that `wdmoe-node` itself requires."""
_EARLY = 0.1
"""Share of a clock's limit from which there is a warning."""
_SLOW_SHARE = 0.4
"""Share of the median link's rate below which there is a warning."""
_NEARLY_HOT_CELSIUS = 10.0
_WEAK_DBM = -75
_RETRIES = 0.3
_LEAST_PACKETS = 200
"""Fewest packets for a meaningful share of retries."""


@dataclass(frozen=True, slots=True)
class Check:
    """One check and its result.

    Attributes:
        node: the node it is about; empty for this machine, the plan or the broker.
    """

    name: str
    level: Level
    detail: str
    node: str = ""


@dataclass(frozen=True, slots=True)
class Rate:
    """Goodput of a link, in Mbit/s.

    Attributes:
        how: how it was measured, in words.
        down_std_mbps, up_std_mbps: one standard deviation; 0 if unknown.
    """

    down_mbps: float
    up_mbps: float
    how: str
    down_std_mbps: float = 0.0
    up_std_mbps: float = 0.0

    @property
    def worse(self) -> tuple[float, float]:
        """Rate of the slower direction and its standard deviation."""
        return min((self.down_mbps, self.down_std_mbps), (self.up_mbps, self.up_std_mbps))


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeFacts:
    """Facts about a node; None for what is unknown.

    Attributes:
        expected: whether the plan names the node.
        quantisation: quantisation of the plan's bundle.
        ignored: why the base station doesn't use the node although it is online; empty if it does.
        restarted: whether the node's process changed during the check.
        proven: number of experts that answered the probe input correctly.
        wrong: what was wrong with the first expert that didn't; empty if all did.
        until: when the node's certificate expires.
        now: time of the check.
    """

    node: str
    expected: bool = True
    quantisation: str
    status: NodeStatus | None = None
    ignored: str = ""
    restarted: bool = False
    telemetry: Telemetry | None = None
    clock: Offset | None = None
    proven: int = 0
    wrong: str = ""
    rate: Rate | None = None
    until: datetime | None = None
    now: datetime


def judge(facts: Sequence[NodeFacts], limits: RunLimits) -> list[Check]:
    """All checks of all nodes."""
    # What is not known of a quick link would be a median that no link reaches.
    rates = [f.rate.worse[0] for f in facts if f.rate and rate_known(*f.rate.worse)]
    typical_mbps = median(rates) if rates else 0.0
    checks = []
    for node in facts:
        for name, level, detail in _node(node, limits, typical_mbps):
            checks.append(Check(name, level, detail, node.node))
    return checks


Result = tuple[str, Level, str]


def _node(facts: NodeFacts, limits: RunLimits, typical_mbps: float) -> Iterator[Result]:
    status = facts.status
    yield "online", *_online(facts)
    yield "id", *_id(facts)
    if status is None or not status.online:
        return
    yield "experts", *_experts(facts)
    yield "certificate", *certificate(facts.until, facts.now)
    machine = status.machine
    yield "RAM", *_memory(machine.available_bytes if machine else None)
    yield "priority", *_priority(status.device)
    yield "disk", *_disk(machine.disk_free_bytes if machine else None, limits)
    yield "clock", *_clock(facts.clock, limits)
    yield "throttling", *_throttling(facts.telemetry)
    yield "heat", *_heat(facts.telemetry, limits)
    yield "link", *_link(facts.rate, limits, typical_mbps)
    wifi = facts.telemetry.wifi if facts.telemetry else None
    no_radio = facts.telemetry is not None and facts.telemetry.route is not None and not _carries(facts.telemetry)
    yield "power save", *_power_save(wifi, no_radio=no_radio)
    yield "channel", *_channel(wifi, no_radio=no_radio)


def _carries(telemetry: Telemetry) -> bool:
    """Whether the node reaches the broker through the wireless interface of its telemetry."""
    return telemetry.wifi is not None and telemetry.wifi.interface == telemetry.route


def _online(facts: NodeFacts) -> tuple[Level, str]:
    status = facts.status
    if status is None:
        return "fail", "no message from it: is it switched on, are its broker address and network right?"
    if not status.online:
        return "fail" if facts.expected else "warn", f"offline: {status.reason or 'unknown reason'}"
    where = f"{status.machine.host}, {status.machine.arch}" if status.machine else "on an unknown machine"
    return ("warn", f"online on {where}, but the plan doesn't name it") if not facts.expected else ("pass", where)


def _id(facts: NodeFacts) -> tuple[Level, str]:
    status = facts.status
    if status and status.rival:
        return "fail", f"a second process tried to use this id: on {status.rival}"
    if facts.restarted:
        return "fail", "two processes alternate with this id, or one keeps restarting"
    return "pass", "used by one process"


def _experts(facts: NodeFacts) -> tuple[Level, str]:
    holding = facts.status.holding if facts.status else None
    if facts.ignored:
        return "fail", facts.ignored
    if facts.wrong:
        return "fail", facts.wrong
    if holding is None:
        return "warn", "holds no experts"
    text = f"{holding.experts}, {holding.quantisation}; hashes checked at its start, {facts.proven} experts tested now"
    if holding.quantisation != facts.quantisation:
        return "warn", f"{text}; the plan's bundle is {facts.quantisation}"
    return "pass", text


def certificate(until: datetime | None, now: datetime) -> tuple[Level, str]:
    """Level and detail of a certificate that expires at `until`."""
    if until is None:
        return "unknown", "no certificate in --keys"
    days = (until - now).total_seconds() / 86400
    text = f"valid until {until:%Y-%m-%d}"
    if days <= 0:
        return "fail", f"expired on {until:%Y-%m-%d}: 'wdmoe-testbed keys rotate' makes a new one"
    return ("warn", f"{text}, {days:.0f} days: 'wdmoe-testbed keys rotate'") if days < RENEWAL_DAYS else ("pass", text)


def _memory(available_bytes: int | None) -> tuple[Level, str]:
    if available_bytes is None:
        return "unknown", "not reported"
    level: Level = (
        "fail" if available_bytes < _SPARE_RAM_BYTES else "warn" if available_bytes < 2 * _SPARE_RAM_BYTES else "pass"
    )
    return level, f"{available_bytes >> 20} MiB available"


def _priority(device: DeviceFacts | None) -> tuple[Level, str]:
    if device is None or device.real_time is None:
        return "unknown", "the node does not say"
    if device.real_time:
        return "pass", "real-time"
    # No fault of the node, and harmless on a device without other work.
    return "pass", "normal, so other work on the device delays answers; its log says why"


def _disk(free_bytes: int | None, limits: RunLimits) -> tuple[Level, str]:
    if free_bytes is None:
        return "unknown", "not reported"
    shortage = limits.disk(free_bytes)
    return ("fail", shortage) if shortage else ("pass", f"{free_bytes >> 20} MiB free")


def _clock(clock: Offset | None, limits: RunLimits) -> tuple[Level, str]:
    if clock is None:
        return "unknown", "no answer to clock probes"
    off_ms, error_ms = clock.offset_ns / 1e6, clock.error_ns / 1e6
    text = f"{off_ms:+.1f} ms (± {error_ms:.1f}) against the base station, estimated"
    if limits.clock(off_ms, error_ms):
        return "fail", f"{text}: let chrony follow the base station"
    return ("warn" if abs(off_ms) - error_ms > _EARLY * limits.most_clock_ms else "pass"), text


def _throttling(telemetry: Telemetry | None) -> tuple[Level, str]:
    thermal = telemetry.thermal if telemetry else None
    if thermal is None or thermal.throttling_now is None:
        return "unknown", "not reported"
    if thermal.throttling_now:
        return "fail", f"now: {thermal.throttling_now}: check cooling and power supply"
    if thermal.throttling_since_boot:
        return "warn", f"since boot: {thermal.throttling_since_boot}"
    return "pass", "none"


def _heat(telemetry: Telemetry | None, limits: RunLimits) -> tuple[Level, str]:
    celsius = telemetry.thermal.soc_celsius if telemetry else None
    if celsius is None:
        return "unknown", "not reported"
    if excess := limits.heat(celsius):
        return "fail", excess
    return ("warn" if celsius > limits.most_celsius - _NEARLY_HOT_CELSIUS else "pass"), f"{celsius:.0f} °C"


def _link(rate: Rate | None, limits: RunLimits, typical_mbps: float) -> tuple[Level, str]:
    if rate is None:
        return "unknown", "not measured"
    text = f"{rate.down_mbps:.1f} Mbit/s down, {rate.up_mbps:.1f} up, by {rate.how}"
    worse_mbps, std_mbps = rate.worse
    if worse_mbps + 2 * std_mbps < limits.least_mbps:
        return "fail", f"{text}; the limit is {limits.least_mbps:g}"
    if worse_mbps - 2 * std_mbps < limits.least_mbps:
        return "unknown", f"{text}, too uncertain to compare with the limit of {limits.least_mbps:g}"
    if worse_mbps < _SLOW_SHARE * typical_mbps:
        return "warn", f"{text}; far below the median of {typical_mbps:.1f}"
    return "pass", text


def _power_save(wifi: Wifi | None, *, no_radio: bool) -> tuple[Level, str]:
    if no_radio:
        return "pass", "not connected by Wi-Fi"
    if wifi is None or wifi.power_save is None:
        return "unknown", "not reported"
    if wifi.power_save:
        return (
            "fail",
            f"on, which adds up to 100 ms per message: run 'iw dev {wifi.interface} set power_save off' on the node",
        )
    return "pass", "off"


def _channel(wifi: Wifi | None, *, no_radio: bool) -> tuple[Level, str]:
    if no_radio:
        return "pass", "not connected by Wi-Fi"
    if wifi is None:
        return "unknown", "not reported"
    if not wifi.connected:
        return "fail", f"{wifi.interface} is not connected to an access point"
    details = [f"channel {wifi.channel}"] if wifi.channel is not None else []
    worse = False
    if wifi.rssi_dbm is not None:
        details.append(f"{wifi.rssi_dbm} dBm")
        worse |= wifi.rssi_dbm < _WEAK_DBM
    if wifi.up_packets is not None and wifi.up_retries is not None and wifi.up_packets >= _LEAST_PACKETS:
        share = wifi.up_retries / wifi.up_packets
        details.append(f"{share:.0%} of frames retransmitted")
        worse |= share > _RETRIES
    if not details:
        return "unknown", "not reported"
    return ("warn" if worse else "pass"), ", ".join(details)
