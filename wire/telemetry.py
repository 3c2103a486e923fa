"""Telemetry that a node publishes once a second: radio, temperatures, power. JSON, not retained.

Values that a device does not report are null. Names end with the unit. "Up" is from the node to the base station,
"down" the other way. Pure: `edge_node.telemetry` reads devices; docs/devices.md lists the sources.
"""

from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from wire.documents import Count, decode_document

SCHEMA = 1
MAX_TELEMETRY_BYTES = 16 << 10
MAX_SENSORS = 64
"""Most temperatures and most rails in one document."""

Small = Annotated[int, Meta(ge=-(2**31), le=2**31)]
Name = Annotated[str, Meta(max_length=64)]
_Celsius = Annotated[dict[Name, float], Meta(max_length=MAX_SENSORS)]


class Wifi(Struct, frozen=True, kw_only=True):
    """One wireless interface.

    Attributes:
        connected: associated with an access point.
        ssid, bssid: of the network and of the access point's radio; `export` makes them anonymous.
        rssi_dbm, rssi_average_dbm: signal strength of the last frames, and the driver's average.
        up_phy_mbps, down_phy_mbps: bit rates of the radio, about twice the throughput of TCP.
        up_mode, down_mode: `ht` (802.11n), `vht` (ac), `he` (ax) or `eht` (be); null for older
            rates, and if the driver reports only the rate.
        up_streams, down_streams: spatial streams.
        up_packets, up_retries, up_failed, down_packets, down_dropped, beacon_losses: counts since the association.
        roams, disconnects: changes of the BSSID and losses of the association since the node's start.
        inactive_ms: time since the last frame from the access point.
    """

    interface: Name
    connected: bool
    ssid: Annotated[str, Meta(max_length=128)] | None = None
    bssid: Name | None = None
    rssi_dbm: Small | None = None
    rssi_average_dbm: Small | None = None
    up_phy_mbps: float | None = None
    down_phy_mbps: float | None = None
    up_mode: Name | None = None
    down_mode: Name | None = None
    up_mcs: Small | None = None
    down_mcs: Small | None = None
    up_streams: Small | None = None
    down_streams: Small | None = None
    up_packets: Count | None = None
    up_retries: Count | None = None
    up_failed: Count | None = None
    down_packets: Count | None = None
    down_dropped: Count | None = None
    beacon_losses: Count | None = None
    frequency_mhz: Small | None = None
    channel: Small | None = None
    width_mhz: Small | None = None
    band_ghz: float | None = None
    power_save: bool | None = None
    associated_s: Count | None = None
    inactive_ms: Count | None = None
    roams: Count = 0
    disconnects: Count = 0


class Thermal(Struct, frozen=True, kw_only=True):
    """Temperatures, and whether heat or the supply makes the device slower.

    Attributes:
        soc_celsius: the hottest sensor of the processor.
        sensors_celsius: all sensors.
        throttled_bits: flags of a Raspberry Pi's firmware, 0 without throttling.
        throttling_now, throttling_since_boot: these flags in words, separated by commas; empty without throttling.
        throttle_events: counted by the kernel since boot.
    """

    soc_celsius: float | None = None
    sensors_celsius: _Celsius = {}
    throttled_bits: Count | None = None
    throttling_now: Annotated[str, Meta(max_length=256)] | None = None
    throttling_since_boot: Annotated[str, Meta(max_length=256)] | None = None
    throttle_events: Count | None = None


class Rail(Struct, frozen=True, kw_only=True):
    """One measured supply rail."""

    volts: float | None = None
    amperes: float | None = None
    watts: float | None = None


class Power(Struct, frozen=True, kw_only=True):
    """Supply and consumption.

    Attributes:
        board_watts: power of the whole board, from a sensor or as the sum of its rails.
        board_watts_from: its source: a rail's name, or `sum of rails`.
        supply_volts: at the board's input.
        core_volts: of the processor's cores.
        rails: measured rails by name.
        mode: name of the power mode, such as `15W`.
    """

    board_watts: float | None = None
    board_watts_from: Name | None = None
    supply_volts: float | None = None
    core_volts: float | None = None
    rails: Annotated[dict[Name, Rail], Meta(max_length=MAX_SENSORS)] = {}
    mode: Name | None = None


class Clocks(Struct, frozen=True, kw_only=True):
    """Clocks and load of the processors.

    Attributes:
        cpu_slowest_mhz, cpu_fastest_mhz: over the cores that are online.
        governor: of the cores, separated by commas if they differ.
        gpu_percent, memory_percent: load of the GPU and of the memory controller.
    """

    cpu_slowest_mhz: float | None = None
    cpu_fastest_mhz: float | None = None
    governor: Name | None = None
    load_1min: float | None = None
    gpu_mhz: float | None = None
    gpu_percent: float | None = None
    memory_percent: float | None = None


class Telemetry(Struct, frozen=True, kw_only=True):
    """One sample. Unknown fields are ignored, so that newer nodes can add some.

    Attributes:
        boot_id: of the node's process, as in its status.
        sequence: counts up from 0; a gap means that samples were lost.
        unix_ns: time of the sample by the node's own clock.
        sampling_ms: how long it took to read the device, in a process beside the node.
        route: interface by which the node reaches the broker.
        wifi: that interface if it is wireless, else the first wireless one; null if there is none.
        warnings: outputs that were not understood or came too late, by source, since the start.
    """

    schema: int
    node: Name
    boot_id: Name
    sequence: Count
    unix_ns: Count
    sampling_ms: float
    route: Name | None = None
    wifi: Wifi | None = None
    thermal: Thermal = Thermal()
    power: Power = Power()
    clocks: Clocks = Clocks()
    warnings: Annotated[dict[Name, Count], Meta(max_length=MAX_SENSORS)] = {}


_decoder = msgspec.json.Decoder(Telemetry)


def encode_telemetry(telemetry: Telemetry) -> bytes:
    """JSON bytes of a sample, without a line break."""
    return msgspec.json.encode(telemetry)


def decode_telemetry(payload: bytes, node: str) -> Telemetry:
    """The sample in `payload`, which arrived on the telemetry topic of `node`.

    Raises:
        FrameError: the payload is too long, not valid, of another schema, or about another node.
    """
    return decode_document(payload, node, _decoder, what="telemetry", most_bytes=MAX_TELEMETRY_BYTES, schema=SCHEMA)
