"""What nodes announce to Home Assistant, held against its rules; real documents of nodes through its templates."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_node.home_assistant import Announcement, check_prefix, discovery_topic
from tests.home_assistant import TOPIC, check_announcement, values
from wire.manifest import Dims
from wire.status import Holding, Machine, NodeStatus, Work, encode_status
from wire.telemetry import Clocks, Power, Telemetry, Thermal, Wifi, encode_telemetry
from wire.topics import Topics

TOPICS = Topics("attic")
STATUS, TELEMETRY = TOPICS.status("pi.1"), TOPICS.telemetry("pi.1")
MACHINE = Machine(
    host="h", pid=1, arch="aarch64", cpus=4, threads=4, ram_bytes=8 << 30, available_bytes=5 << 30, wdmoe="0",
    onnxruntime="1", disk_free_bytes=20 << 30,
)  # fmt: skip
HOLDING = Holding(
    experts="L*:E0",
    model_sha256="0" * 64,
    dims=Dims(hidden=8, intermediate=16, layers=2, experts=4, top_k=2, vocab=10, max_positions=32),
    quantisation="int4",
    resident_bytes=300 << 20,
)
ONLINE = NodeStatus(
    schema=1, node="pi.1", boot_id="b", state="online", since_unix_ms=1, holding=HOLDING, machine=MACHINE,
    work=Work(requests=3, rows=40, rows_per_s=12.34),
)  # fmt: skip
LAST_WILL = NodeStatus(
    schema=1, node="pi.1", boot_id="b", state="offline", since_unix_ms=0, reason="connection lost", machine=MACHINE
)
FAILED = NodeStatus(
    schema=1, node="pi.1", boot_id="b", state="offline", since_unix_ms=0, reason="can't start: " + 500 * "x"
)


def telemetry(**parts: object) -> bytes:
    return encode_telemetry(
        Telemetry(schema=1, node="pi.1", boot_id="b", sequence=0, unix_ns=0, sampling_ms=1.0, **parts)  # type: ignore[arg-type]
    )


FULL = telemetry(
    wifi=Wifi(interface="wlan0", connected=True, rssi_dbm=-61, up_phy_mbps=433.3, down_phy_mbps=390.0),
    thermal=Thermal(soc_celsius=61.7, throttling_now="under-voltage"),
    power=Power(board_watts=4.56, supply_volts=5.123),
    clocks=Clocks(load_1min=1.25),
)
BARE = telemetry()


@pytest.fixture
def announcement() -> Announcement:
    return Announcement("homeassistant", TOPICS, "pi.1", model="edge node, pi5")


def test_values_of_a_node_that_reports_everything(announcement: Announcement) -> None:
    assert announcement.take(FULL)
    assert not announcement.take(FULL)  # nothing new: not published again
    components = check_announcement(announcement.topic, announcement.document())
    found = values(components, {STATUS: encode_status(ONLINE), TELEMETRY: FULL})
    assert found == {
        "takes_work": "ON", "reason": "none", "rows_per_s": "12.3", "rows": "40", "experts_memory": "300",
        "memory_available": "5120", "disk_free": "20480", "temperature": "62", "throttled": "ON", "power": "4.6",
        "supply": "5.12", "load": "1.2", "wifi_signal": "-61", "wifi_up": "433", "wifi_down": "390",
    }  # fmt: skip


def test_only_what_a_device_reports_is_announced(announcement: Announcement) -> None:
    assert not announcement.take(BARE)
    components = check_announcement(announcement.topic, announcement.document())
    assert {component["state_topic"] for component in components.values()} == {STATUS}
    assert not announcement.take(b"damaged")
    assert announcement.take(telemetry(thermal=Thermal(soc_celsius=40.0)))
    assert check_announcement(announcement.topic, announcement.document()).keys() - components.keys() == {"temperature"}
    # A sensor that was there stays, even if its value is missing now.
    announcement.take(BARE)
    assert "temperature" in check_announcement(announcement.topic, announcement.document())


@pytest.mark.parametrize("status", [LAST_WILL, FAILED], ids=["last will", "failed start"])
def test_a_node_that_is_away(announcement: Announcement, status: NodeStatus) -> None:
    announcement.take(FULL)
    components = check_announcement(announcement.topic, announcement.document())
    found = values(components, {STATUS: encode_status(status), TELEMETRY: BARE})
    assert found.pop("takes_work") == "OFF"
    assert found.pop("reason") == status.reason[:255]
    of_status = {key for key, component in components.items() if component["state_topic"] == STATUS}
    assert {found.pop(key) for key in of_status & found.keys()} == {"unavailable"}
    # Telemetry goes on while a node is too hot to take work, so silence hides its sensors, not the status.
    assert all(components[key]["expire_after"] >= 3 for key in found)
    assert found.pop("throttled") == "OFF"
    assert set(found.values()) == {"None"}


# Few characters, so that names that could become equal are found.
names = st.builds("{}{}".format, st.sampled_from("aZ9"), st.text("a9._-", max_size=6))


@given(names, names, names, names)
def test_topics_are_accepted_and_differ(cluster: str, node: str, other_cluster: str, other_node: str) -> None:
    topic = discovery_topic("homeassistant", cluster, node)
    assert TOPIC.fullmatch(topic)
    if (cluster, node) != (other_cluster, other_node):
        assert topic != discovery_topic("homeassistant", other_cluster, other_node)


@pytest.mark.parametrize("prefix", ["", "a//b", "/a", "a/", "a/+/b", "a/#", "a b", "ä"])
def test_prefixes_that_begin_no_topic(prefix: str) -> None:
    with pytest.raises(ValueError, match=re.escape("not a prefix of topics")):
        check_prefix(prefix)


def test_prefixes() -> None:
    assert [check_prefix(prefix) for prefix in ("homeassistant", "home/1.2_x-y")] == ["homeassistant", "home/1.2_x-y"]
