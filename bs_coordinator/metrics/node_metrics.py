"""Metrics of the fleet: each node's status, health, link estimate and telemetry, from the newest snapshot."""

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Generic, NamedTuple, TypeVar

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from bs_coordinator.links import NodeEstimate
from bs_coordinator.metrics.snapshot import Snapshot
from bs_coordinator.nodes.telemetry_inbox import ReceivedTelemetry
from wire.status import Holding, Machine, NodeStatus, Residency
from wire.telemetry import Telemetry, Wifi

_T = TypeVar("_T")
_BYTES_PER_MBIT = 1e6 / 8
_HERTZ_PER_MHZ = 1e6
_FAILURES = ("failed", "quarantined", "doubted")


class _Metric(NamedTuple, Generic[_T]):
    """A metric with at most one value per node.

    Attributes:
        read: the value; None if it is not known.
    """

    name: str
    text: str
    read: Callable[[_T], float | None]
    counter: bool = False


_OF_STATUS: tuple[_Metric[NodeStatus], ...] = (
    _Metric("experts", "Experts, or slices, that the node serves.", lambda status: len(status.unit_ids())),
)
_OF_HOLDING: tuple[_Metric[Holding], ...] = (
    _Metric("experts_resident_bytes", "RAM that the node's experts take.", lambda holding: holding.resident_bytes),
)
_OF_MACHINE: tuple[_Metric[Machine], ...] = (
    _Metric("memory_bytes", "RAM of the device.", lambda machine: machine.ram_bytes),
    _Metric("memory_available_bytes", "RAM available at the last status.", lambda machine: machine.available_bytes),
    _Metric("disk_free_bytes", "Free space of the disk with the bundle.", lambda machine: machine.disk_free_bytes),
)
_OF_RESIDENCY: tuple[_Metric[Residency], ...] = (
    _Metric("expert_loads", "Experts loaded while a request waited.", lambda kept: kept.loads, counter=True),
    _Metric("expert_evictions", "Experts removed from memory.", lambda kept: kept.evictions, counter=True),
)
_OF_LINK: tuple[_Metric[NodeEstimate], ...] = (
    _Metric("rtt_seconds", "Estimated round trip of an empty message.", lambda e: e.link.rtt_s),
    _Metric("rtt_stddev_seconds", "Standard deviation of the estimated round trip.", lambda e: e.link.rtt_std_s),
    _Metric("jitter_seconds", "Standard deviation of one round trip.", lambda e: e.link.noise_s),
    _Metric("down_bytes_per_second", "Estimated goodput to the node.", lambda e: e.link.down_mbps * _BYTES_PER_MBIT),
    _Metric(
        "down_stddev_bytes_per_second",
        "Standard deviation of the estimated goodput to the node.",
        lambda e: e.link.down_std_mbps * _BYTES_PER_MBIT,
    ),
    _Metric("up_bytes_per_second", "Estimated goodput from the node.", lambda e: e.link.up_mbps * _BYTES_PER_MBIT),
    _Metric(
        "up_stddev_bytes_per_second",
        "Standard deviation of the estimated goodput from the node.",
        lambda e: e.link.up_std_mbps * _BYTES_PER_MBIT,
    ),
    _Metric("probe_down_bytes", "Frames of probes to the node.", lambda e: e.probing.down_bytes, counter=True),
    _Metric("probe_up_bytes", "Frames of answers to probes.", lambda e: e.probing.up_bytes, counter=True),
    _Metric("probes_refused", "Probes that did not fit into the budget.", lambda e: e.probing.refused, counter=True),
    _Metric("samples", "Samples of the link so far.", lambda e: e.link.samples, counter=True),
    _Metric("stale", "1 if there were no samples for too long.", lambda e: e.stale),
)
_OF_TELEMETRY: tuple[_Metric[Telemetry], ...] = (
    _Metric("temperature_celsius", "Hottest sensor of the processor.", lambda t: t.thermal.soc_celsius),
    _Metric(
        "throttled",
        "1 if heat or the supply makes the device slower now.",
        lambda t: None if t.thermal.throttling_now is None else bool(t.thermal.throttling_now),
    ),
    _Metric("throttle_events", "Counted by the node's kernel.", lambda t: t.thermal.throttle_events, counter=True),
    _Metric("power_watts", "Power of the whole board.", lambda t: t.power.board_watts),
    _Metric("supply_volts", "At the board's input.", lambda t: t.power.supply_volts),
    _Metric("load1", "Load average over one minute.", lambda t: t.clocks.load_1min),
    _Metric(
        "cpu_slowest_hertz",
        "Clock of the slowest core that is online.",
        lambda t: _scaled(t.clocks.cpu_slowest_mhz, _HERTZ_PER_MHZ),
    ),
    _Metric(
        "cpu_fastest_hertz",
        "Clock of the fastest core that is online.",
        lambda t: _scaled(t.clocks.cpu_fastest_mhz, _HERTZ_PER_MHZ),
    ),
    _Metric("gpu_utilization_ratio", "Load of the GPU, 0 to 1.", lambda t: _scaled(t.clocks.gpu_percent, 0.01)),
)
_OF_WIFI: tuple[_Metric[Wifi], ...] = (
    _Metric("connected", "1 if associated with an access point.", lambda wifi: wifi.connected),
    _Metric("signal_dbm", "Signal strength of the last frames.", lambda wifi: wifi.rssi_dbm),
    _Metric(
        "up_phy_bytes_per_second",
        "The radio's bit rate from the node, about twice the throughput of TCP.",
        lambda wifi: _scaled(wifi.up_phy_mbps, _BYTES_PER_MBIT),
    ),
    _Metric(
        "down_phy_bytes_per_second",
        "The radio's bit rate to the node, about twice the throughput of TCP.",
        lambda wifi: _scaled(wifi.down_phy_mbps, _BYTES_PER_MBIT),
    ),
    _Metric("up_retries", "Frames repeated since the association.", lambda wifi: wifi.up_retries, counter=True),
    _Metric("up_failed", "Frames lost since the association.", lambda wifi: wifi.up_failed, counter=True),
    _Metric("roams", "Changes of the access point.", lambda wifi: wifi.roams, counter=True),
    _Metric("disconnects", "Losses of the association.", lambda wifi: wifi.disconnects, counter=True),
)


class NodeMetrics(Collector):
    """Metrics of the newest snapshot; none before the first."""

    def __init__(self) -> None:
        # Replaced as a whole: expositions are made on another thread.
        self._shown: tuple[Snapshot, Collection[str]] | None = None

    def show(self, snapshot: Snapshot, absent: Collection[str]) -> None:
        """From now on expose a snapshot.

        Args:
            snapshot: to describe.
            absent: names of nodes that were seen earlier and are not in it.
        """
        self._shown = (snapshot, absent)

    def collect(self) -> Iterator[Metric]:
        """All metrics, for one exposition."""
        if self._shown is None:
            return
        snapshot, absent = self._shown
        yield GaugeMetricFamily("wdmoe_experts", "Experts of the model, or their slices.", snapshot.experts)
        yield GaugeMetricFamily(
            "wdmoe_experts_local", "Experts, or slices, that the base station keeps.", snapshot.local
        )
        yield GaugeMetricFamily("wdmoe_experts_missing", "Experts, or slices, that no node holds.", snapshot.missing)
        yield GaugeMetricFamily(
            "wdmoe_experts_lost", "1 if experts can't be asked: missing, or all holders are left out.", snapshot.lost
        )
        yield _count("wdmoe_messages_dropped", "Messages from nodes that were of no use.", snapshot.dropped)
        yield _count(
            "wdmoe_node_requests_resent",
            "Requests to nodes that were sent again, to other nodes or on a new connection.",
            snapshot.resent,
        )
        yield from _of_nodes(snapshot, absent)
        yield from _of_statuses(snapshot.statuses)
        yield from _families("wdmoe_link", _OF_LINK, {estimate.node: estimate for estimate in snapshot.estimates})
        yield from _of_telemetry(snapshot.telemetry)


def _of_nodes(snapshot: Snapshot, absent: Collection[str]) -> Iterator[Metric]:
    up = GaugeMetricFamily("wdmoe_node_up", "1 if the node is online, 0 soon after it left.", labels=["node"])
    usable = GaugeMetricFamily(
        "wdmoe_node_usable", "1 if the node may be asked, 0 while it is left out after a failure.", labels=["node"]
    )
    failures = CounterMetricFamily(
        "wdmoe_node_failures",
        "How often the node was left out (failed, quarantined) or doubted.",
        labels=["node", "kind"],
    )
    info = InfoMetricFamily("wdmoe_node", "What the node is.", labels=["node"])
    for node, status in sorted(snapshot.statuses.items()):
        up.add_metric([node], 1)
        usable.add_metric([node], node in snapshot.usable)
        for kind in _FAILURES:
            failures.add_metric([node, kind], snapshot.failures.get((node, kind), 0))
        facts = {
            "quantisation": status.holding.quantisation if status.holding else "",
            "arch": status.machine.arch if status.machine else "",
            "version": status.machine.wdmoe if status.machine else "",
            "profile": status.device.profile if status.device else "",
            "provider": status.device.provider if status.device else "",
        }
        info.add_metric([node], facts)
    for node in sorted(absent):
        up.add_metric([node], 0)
    yield from (up, usable, failures, info)


def _of_statuses(statuses: Mapping[str, NodeStatus]) -> Iterator[Metric]:
    yield from _families("wdmoe_node", _OF_STATUS, statuses)
    yield from _families("wdmoe_node", _OF_HOLDING, {node: status.holding for node, status in statuses.items()})
    yield from _families("wdmoe_node", _OF_MACHINE, {node: status.machine for node, status in statuses.items()})
    yield from _families("wdmoe_node", _OF_RESIDENCY, {node: status.residency for node, status in statuses.items()})


def _of_telemetry(samples: Mapping[str, ReceivedTelemetry]) -> Iterator[Metric]:
    times = GaugeMetricFamily(
        "wdmoe_node_telemetry_timestamp_seconds", "When the node's last telemetry arrived.", labels=["node"]
    )
    for node, sample in samples.items():
        times.add_metric([node], sample.unix_ns / 1e9)
    yield times
    known = {node: sample.telemetry for node, sample in samples.items()}
    yield from _families("wdmoe_node", _OF_TELEMETRY, known)
    yield from _families("wdmoe_node_wifi", _OF_WIFI, {node: t.wifi for node, t in known.items()})


def _families(prefix: str, metrics: tuple[_Metric[_T], ...], nodes: Mapping[str, _T | None]) -> Iterator[Metric]:
    for name, text, read, counter in metrics:
        kind = CounterMetricFamily if counter else GaugeMetricFamily
        family = kind(f"{prefix}_{name}", text, labels=["node"])
        for node, known in sorted(nodes.items()):
            if known is not None and (value := read(known)) is not None:
                family.add_metric([node], float(value))
        yield family


def _count(name: str, text: str, counts: Mapping[str, int]) -> Metric:
    family = CounterMetricFamily(name, text, labels=["reason"])
    for reason, count in sorted(counts.items()):
        family.add_metric([reason], count)
    return family


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor
