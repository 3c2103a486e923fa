"""Tables of the nodes and their links while a cell runs: telemetry, sensors, link samples and clocks."""

from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import pyarrow as pa

from bs_coordinator.nodes.clock_offsets import ClockSample, Offset, OneWay
from bs_coordinator.nodes.telemetry_inbox import ReceivedTelemetry
from testbed.run_directory.columns import BOOL, FLOAT, INT, NAME, Column, Table
from wire.telemetry import Telemetry

Moment = Literal["before", "during", "after"]
"""When a clock was probed, relative to the measurement of the cell."""
TRUTH, ESTIMATE, FORECAST, COUNT = "truth", "estimate", "forecast", "count"
"""Kinds of link samples."""
_UNIX = "wall clock of the base station"
_MONOTONIC = "steady clock of the base station"
_NODE = "id of the node"


class LinkSample(NamedTuple):
    """One quantity of one node's link at one moment; `kind` is one of the constants above."""

    unix_ns: int
    monotonic_ns: int
    node: str
    kind: str
    quantity: str
    value: float


class SensorRow(NamedTuple):
    """One sensor of one telemetry sample."""

    arrived: ReceivedTelemetry
    sensor: str
    quantity: str
    value: float


class ClockRow(NamedTuple):
    """The base station's clocks at one moment or, with a node, that node's clock against them."""

    unix_ns: int
    monotonic_ns: int
    node: str | None = None
    offset: Offset | None = None


class ClockProbeRow(NamedTuple):
    """One probe of a node's clock, with the one-way delays that all probes of the cell imply for it."""

    moment: Moment
    sample: ClockSample
    one_way: OneWay


def sensor_rows(arrived: ReceivedTelemetry) -> Iterator[SensorRow]:
    """One telemetry sample's rows of `sensors`."""
    sample = arrived.telemetry
    for sensor, celsius in sample.thermal.sensors_celsius.items():
        yield SensorRow(arrived, sensor, "celsius", celsius)
    for rail, measured in sample.power.rails.items():
        for quantity in ("volts", "amperes", "watts"):
            if (value := getattr(measured, quantity)) is not None:
                yield SensorRow(arrived, rail, quantity, value)


def _of_sample(part: Callable[[Telemetry], object]) -> Callable[..., Column[ReceivedTelemetry]]:
    """Declares columns that are fields of one part of a telemetry sample; empty where the sample lacks the part."""

    def column(name: str, dtype: pa.DataType, meaning: str, *, prefix: str = "") -> Column[ReceivedTelemetry]:
        def value(arrived: ReceivedTelemetry) -> object:
            found = part(arrived.telemetry)
            return None if found is None else getattr(found, name)

        return Column(prefix + name, dtype, meaning, value)

    return column


_sample = _of_sample(lambda telemetry: telemetry)
_thermal = _of_sample(lambda telemetry: telemetry.thermal)
_power = _of_sample(lambda telemetry: telemetry.power)
_clocks = _of_sample(lambda telemetry: telemetry.clocks)
_wifi_field = _of_sample(lambda telemetry: telemetry.wifi)


def _wifi(name: str, dtype: pa.DataType, meaning: str) -> Column[ReceivedTelemetry]:
    return _wifi_field(name, dtype, meaning, prefix="wifi_")


TELEMETRY = Table[ReceivedTelemetry](
    "telemetry",
    "one row per telemetry sample of a node, about one a second",
    (
        Column("unix_ns", INT, f"arrival, {_UNIX}"),
        Column("monotonic_ns", INT, f"arrival, {_MONOTONIC}"),
        _sample("node", NAME, _NODE),
        _sample("sequence", INT, "counts up from 0; a gap is a sample that was lost on the way"),
        Column("node_unix_ns", INT, "time of reading, the node's wall clock", lambda a: a.telemetry.unix_ns),
        _sample("sampling_ms", FLOAT, "time that reading the sensors took"),
        _sample("route", NAME, "interface through which the node reaches the broker"),
        _wifi("interface", NAME, "wireless interface of the `wifi_` columns"),
        _wifi("connected", BOOL, "whether it is connected to an access point"),
        _wifi("ssid", NAME, "name of the network"),
        _wifi("bssid", NAME, "address of the access point's radio"),
        _wifi("rssi_dbm", INT, "signal of the last frames"),
        _wifi("rssi_average_dbm", INT, "signal as smoothed by the driver"),
        _wifi("up_phy_mbps", FLOAT, "PHY rate from the node to the access point"),
        _wifi("down_phy_mbps", FLOAT, "PHY rate from the access point to the node"),
        _wifi("up_mode", NAME, "legacy, ht, vht, he or eht; to the access point"),
        _wifi("down_mode", NAME, "legacy, ht, vht, he or eht; from the access point"),
        _wifi("up_mcs", INT, "modulation and coding scheme index, to the access point"),
        _wifi("down_mcs", INT, "modulation and coding scheme index, from the access point"),
        _wifi("up_streams", INT, "spatial streams, to the access point"),
        _wifi("down_streams", INT, "spatial streams, from the access point"),
        _wifi("up_packets", INT, "packets sent since the association"),
        _wifi("up_retries", INT, "retransmissions since the association"),
        _wifi("up_failed", INT, "packets given up since the association"),
        _wifi("down_packets", INT, "packets received since the association"),
        _wifi("down_dropped", INT, "received packets dropped since the association"),
        _wifi("beacon_losses", INT, "lost beacons since the association"),
        _wifi("frequency_mhz", INT, "centre of the primary channel"),
        _wifi("channel", INT, "channel number"),
        _wifi("width_mhz", INT, "channel width"),
        _wifi("band_ghz", FLOAT, "2.4, 5 or 6"),
        _wifi("power_save", BOOL, "whether the radio sleeps between beacons"),
        _wifi("associated_s", INT, "time since the association"),
        _wifi("inactive_ms", INT, "time since the last frame from the access point"),
        _wifi("roams", INT, "changes of the access point since the node's start"),
        _wifi("disconnects", INT, "losses of the association since the node's start"),
        _thermal("soc_celsius", FLOAT, "hottest sensor of the processor"),
        _thermal("throttled_bits", INT, "flags of the Raspberry Pi firmware; 0 if it doesn't throttle"),
        _thermal("throttling_now", NAME, "flags that are set now, in words"),
        _thermal("throttling_since_boot", NAME, "flags that have been set since boot, in words"),
        _thermal("throttle_events", INT, "throttling events counted by the kernel since boot"),
        _power("board_watts", FLOAT, "power of the whole board"),
        _power("board_watts_from", NAME, "rail that measures it, or `sum of rails`"),
        _power("supply_volts", FLOAT, "voltage at the board's input"),
        _power("core_volts", FLOAT, "voltage of the processor's cores"),
        _power("mode", NAME, "name of the power mode"),
        _clocks("cpu_slowest_mhz", FLOAT, "slowest core that is online"),
        _clocks("cpu_fastest_mhz", FLOAT, "fastest core that is online"),
        _clocks("governor", NAME, "frequency governor of the cores"),
        _clocks("load_1min", FLOAT, "runnable processes, mean of one minute"),
        _clocks("gpu_mhz", FLOAT, "clock of the GPU"),
        _clocks("gpu_percent", FLOAT, "load of the GPU"),
        _clocks("memory_percent", FLOAT, "load of the memory controller"),
        Column(
            "warnings", INT, "tool outputs that came too late or could not be parsed, since the node's start",
            lambda a: sum(a.telemetry.warnings.values()),
        ),
    ),
)  # fmt: skip

SENSORS = Table[SensorRow](
    "sensors",
    "temperatures and supply rails of the telemetry samples, one row per sensor and quantity",
    (
        Column("unix_ns", INT, f"arrival, {_UNIX}", lambda r: r.arrived.unix_ns),
        Column("monotonic_ns", INT, f"arrival, {_MONOTONIC}", lambda r: r.arrived.monotonic_ns),
        Column("node", NAME, _NODE, lambda r: r.arrived.telemetry.node),
        Column("sensor", NAME, "name of the sensor or rail"),
        Column("quantity", NAME, "celsius, volts, amperes or watts"),
        Column("value", FLOAT, "value in that unit"),
    ),
)

LINK_SAMPLES = Table[LinkSample](
    "link_samples",
    "one row per sample, node and quantity",
    (
        Column("unix_ns", INT, _UNIX),
        Column("monotonic_ns", INT, _MONOTONIC),
        Column("node", NAME, _NODE),
        Column(
            "kind",
            NAME,
            "truth (as configured, emulated networks only), estimate, forecast (what policies see), or count (of "
            "probes since the base station's start)",
        ),
        Column("quantity", NAME, "measured quantity; its name ends in the unit"),
        Column("value", FLOAT, "value in the unit that ends the quantity's name"),
    ),
)

CLOCKS = Table[ClockRow](
    "clocks",
    "the base station's clocks at each sample; in rows with a node, that node's clock against them",
    (
        Column("unix_ns", INT, _UNIX),
        Column("monotonic_ns", INT, _MONOTONIC),
        Column("node", NAME, "id of the node; empty in the base station's own row"),
        Column(
            "offset_ns", INT, "node's wall clock minus the base station's, estimated from four timestamps",
            lambda r: round(r.offset.offset_ns) if r.offset else None,
        ),
        Column(
            "error_ns", INT, "largest possible error of the offset",
            lambda r: round(r.offset.error_ns) if r.offset else None,
        ),
    ),
)  # fmt: skip

CLOCK_PROBES = Table[ClockProbeRow](
    "clock_probes",
    "one row per probe of a node's clock",
    (
        Column("unix_ns", INT, f"middle of the probe, {_UNIX}", lambda r: r.sample.at_unix_ns),
        Column("node", NAME, _NODE, lambda r: r.sample.node),
        Column("moment", NAME, "before, during or after the measurement of the cell"),
        Column("sent_unix_ns", INT, f"the probe leaves, {_UNIX}", lambda r: r.sample.sent_unix_ns),
        Column(
            "node_arrived_unix_ns", INT, "the probe arrives, wall clock of the node",
            lambda r: r.sample.node_arrived_unix_ns,
        ),
        Column(
            "node_left_unix_ns", INT, "the answer leaves, wall clock of the node",
            lambda r: r.sample.node_left_unix_ns,
        ),
        Column("arrived_unix_ns", INT, f"the answer arrives, {_UNIX}", lambda r: r.sample.arrived_unix_ns),
        Column("offset_low_ns", INT, "the node's clock is at least this far ahead", lambda r: r.sample.low_ns),
        Column("offset_high_ns", INT, "the node's clock is at most this far ahead", lambda r: r.sample.high_ns),
        Column(
            "down_estimated_ns", INT, "estimated delay from base station to node",
            lambda r: round(r.one_way.down_ns),
        ),
        Column("up_estimated_ns", INT, "estimated delay from node to base station", lambda r: round(r.one_way.up_ns)),
        Column("one_way_error_ns", INT, "largest possible error of both delays", lambda r: round(r.one_way.error_ns)),
    ),
)  # fmt: skip
