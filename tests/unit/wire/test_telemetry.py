"""Telemetry documents: every valid document decodes to what was encoded, and anything else is refused."""

import msgspec
import pytest

from wire.errors import FrameError
from wire.telemetry import (
    MAX_SENSORS,
    MAX_TELEMETRY_BYTES,
    SCHEMA,
    Power,
    Rail,
    Telemetry,
    Thermal,
    Wifi,
    decode_telemetry,
    encode_telemetry,
)

SAMPLE = Telemetry(
    schema=SCHEMA,
    node="pi1",
    boot_id="0123456789abcdef",
    sequence=7,
    unix_ns=1_700_000_000_000_000_000,
    sampling_ms=3.2,
    route="wlan0",
    wifi=Wifi(
        interface="wlan0", connected=True, ssid="lab", bssid="02:00:00:00:01:00", rssi_dbm=-54, up_phy_mbps=433.3
    ),
    thermal=Thermal(soc_celsius=48.3, sensors_celsius={"cpu_thermal temp1": 48.3}),
    power=Power(board_watts=4.5, rails={"VDD_IN": Rail(volts=5.0, amperes=0.9, watts=4.5)}),
)


def test_a_sample_decodes_to_what_was_encoded() -> None:
    assert decode_telemetry(encode_telemetry(SAMPLE), "pi1") == SAMPLE


def test_fields_of_newer_nodes_are_ignored() -> None:
    document = msgspec.json.decode(encode_telemetry(SAMPLE)) | {"moonlight_lux": 0.25}
    assert decode_telemetry(msgspec.json.encode(document), "pi1") == SAMPLE


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"schema": 2}, "version"),
        ({"node": "pi2"}, "node"),
        ({"sequence": -1}, "telemetry"),
        ({"unix_ns": 2**63}, "telemetry"),
        ({"wifi": {"interface": "wlan0", "connected": "yes"}}, "telemetry"),
        ({"wifi": {"interface": "w" * 65, "connected": True}}, "telemetry"),
        ({"thermal": {"sensors_celsius": {f"s{i}": 1.0 for i in range(MAX_SENSORS + 1)}}}, "telemetry"),
        ({"padding": "x" * MAX_TELEMETRY_BYTES}, "length"),
    ],
)
def test_what_is_no_sample_of_this_node_is_refused(change: dict[str, object], reason: str) -> None:
    document = msgspec.json.decode(encode_telemetry(SAMPLE)) | change
    with pytest.raises(FrameError) as caught:
        decode_telemetry(msgspec.json.encode(document), "pi1")
    assert caught.value.reason == reason


@pytest.mark.parametrize("payload", [b"", b"{", b"[]", b"\xff\xfe", b'{"schema":1}', b'{"sampling_ms":1e999}'])
def test_what_is_no_document_is_refused(payload: bytes) -> None:
    with pytest.raises(FrameError):
        decode_telemetry(payload, "pi1")


def test_the_largest_sample_fits() -> None:
    name = "n" * 60
    crowded = msgspec.structs.replace(
        SAMPLE,
        thermal=Thermal(sensors_celsius={f"{name}{i:02d}": -12.345678 for i in range(MAX_SENSORS)}),
        power=Power(
            rails={
                f"{name}{i:02d}": Rail(volts=12.345678, amperes=1.234567, watts=15.241566) for i in range(MAX_SENSORS)
            }
        ),
    )
    assert len(encode_telemetry(crowded)) <= MAX_TELEMETRY_BYTES
