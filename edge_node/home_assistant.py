"""What a node announces to Home Assistant, so that it appears there as a device with sensors. Pure.

Source: https://www.home-assistant.io/integrations/mqtt/#device-discovery-payload (Home Assistant 2024.11 and newer).
The sensors read the node's status and telemetry, which are JSON; each has a template that picks its value.
"""

import re
import zlib
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import msgspec

from wire import __version__
from wire.errors import FrameError
from wire.telemetry import Telemetry, decode_telemetry
from wire.topics import Topics

DEFAULT_PREFIX = "homeassistant"
"""Of the topics on which Home Assistant listens for devices, unless it is configured otherwise."""
_EXPIRES_S = 30
"""Telemetry comes once a second: without any for this long, its sensors become unavailable."""
_MIB = 1 << 20


def check_prefix(prefix: str) -> str:
    """Return `prefix` if it can begin a topic.

    Raises:
        ValueError: it is empty, or contains characters with a meaning in MQTT.
    """
    if re.fullmatch(r"[\w.-]+(/[\w.-]+)*", prefix, re.ASCII) is None:
        raise ValueError(f"{prefix[:80]!r} is not a prefix of topics: give a name such as '{DEFAULT_PREFIX}'")
    return prefix


def discovery_topic(prefix: str, cluster: str, node: str) -> str:
    """The topic on which a node announces itself."""
    return f"{prefix}/device/{_topic_level(cluster)}/{_topic_level(node)}/config"


class _Entity(NamedTuple):
    """One sensor of a node.

    Attributes:
        key: names it within the node; never changed, or Home Assistant takes it for another sensor.
        value: Jinja template of its value.
        options: further options, as Home Assistant names them.
        has: whether a sample of telemetry has the value; None for sensors that read the status.
        always: shown as available while the node is offline as well.
    """

    key: str
    name: str
    platform: Literal["sensor", "binary_sensor"]
    value: str
    options: dict[str, Any]
    has: Callable[[Telemetry], bool] | None = None
    always: bool = False


def _number(section: str, field: str, *, digits: int = 0, divisor: int = 1) -> str:
    """A template for a number that may be null, or whose whole section may be; rounded, to keep histories small."""
    rounded = f"(v / {divisor})" if divisor != 1 else "v"
    rounded += f" | round({digits})" if digits else " | round | int"
    found = f"(value_json.{section} or {{}}).{field} | default(none)"
    return f"{{% set v = {found} %}}{{{{ none if v is none else {rounded} }}}}"


def _measured(unit: str, device_class: str | None = None, *, diagnostic: bool = False) -> dict[str, Any]:
    options: dict[str, Any] = {"unit_of_measurement": unit, "state_class": "measurement"}
    options |= {"device_class": device_class} if device_class else {}
    return options | ({"entity_category": "diagnostic"} if diagnostic else {})


_ENTITIES = (
    _Entity(
        "takes_work", "Takes work", "binary_sensor", "{{ 'ON' if value_json.state == 'online' else 'OFF' }}",
        {"device_class": "running"}, always=True,
    ),
    _Entity(
        "reason", "Reason for being offline", "sensor", "{{ (value_json.reason | default('') or 'none')[:255] }}",
        {"entity_category": "diagnostic"}, always=True,
    ),
    _Entity("rows_per_s", "Rows per second", "sensor", _number("work", "rows_per_s", digits=1), _measured("rows/s")),
    _Entity(
        "rows", "Rows computed", "sensor", _number("work", "rows"),
        {"unit_of_measurement": "rows", "state_class": "total_increasing"},
    ),
    _Entity(
        "experts_memory", "Memory of experts", "sensor", _number("holding", "resident_bytes", divisor=_MIB),
        _measured("MiB", "data_size", diagnostic=True),
    ),
    _Entity(
        "memory_available", "Memory available", "sensor", _number("machine", "available_bytes", divisor=_MIB),
        _measured("MiB", "data_size", diagnostic=True),
    ),
    _Entity(
        "disk_free", "Disk free", "sensor", _number("machine", "disk_free_bytes", divisor=_MIB),
        _measured("MiB", "data_size", diagnostic=True),
    ),
    _Entity(
        "temperature", "Temperature", "sensor", _number("thermal", "soc_celsius"), _measured("°C", "temperature"),
        lambda t: t.thermal.soc_celsius is not None,
    ),
    _Entity(
        "throttled", "Throttled", "binary_sensor",
        "{% set v = (value_json.thermal or {}).throttling_now | default(none) %}{{ 'ON' if v else 'OFF' }}",
        {"device_class": "problem"}, lambda t: t.thermal.throttling_now is not None,
    ),
    _Entity(
        "power", "Power", "sensor", _number("power", "board_watts", digits=1), _measured("W", "power"),
        lambda t: t.power.board_watts is not None,
    ),
    _Entity(
        "supply", "Supply voltage", "sensor", _number("power", "supply_volts", digits=2),
        _measured("V", "voltage", diagnostic=True), lambda t: t.power.supply_volts is not None,
    ),
    _Entity(
        "load", "Load", "sensor", _number("clocks", "load_1min", digits=1),
        {"state_class": "measurement", "entity_category": "diagnostic"}, lambda t: t.clocks.load_1min is not None,
    ),
    _Entity(
        "wifi_signal", "Wi-Fi signal", "sensor", _number("wifi", "rssi_dbm"), _measured("dBm", "signal_strength"),
        lambda t: t.wifi is not None and t.wifi.rssi_dbm is not None,
    ),
    _Entity(
        "wifi_up", "Wi-Fi bit rate up", "sensor", _number("wifi", "up_phy_mbps"),
        _measured("Mbit/s", "data_rate", diagnostic=True),
        lambda t: t.wifi is not None and t.wifi.up_phy_mbps is not None,
    ),
    _Entity(
        "wifi_down", "Wi-Fi bit rate down", "sensor", _number("wifi", "down_phy_mbps"),
        _measured("Mbit/s", "data_rate", diagnostic=True),
        lambda t: t.wifi is not None and t.wifi.down_phy_mbps is not None,
    ),
)  # fmt: skip


class Announcement:
    """A node's announcement. It grows when telemetry has values for further sensors.

    Attributes:
        topic: where to publish `document`, retained.
    """

    def __init__(self, prefix: str, topics: Topics, node: str, *, model: str) -> None:
        """Without telemetry so far: only sensors that read the status.

        Args:
            prefix: of Home Assistant's discovery topics.
            model: what to show as the device's model.
        """
        self.topic = discovery_topic(prefix, topics.cluster, node)
        self._topics = topics
        self._node = node
        self._model = model
        self._known = {entity.key for entity in _ENTITIES if entity.has is None}

    def take(self, sample: bytes) -> bool:
        """Take note of encoded telemetry; returns whether `document` has changed."""
        try:
            telemetry = decode_telemetry(sample, self._node)
        except FrameError:
            return False  # receivers count it
        found = {entity.key for entity in _ENTITIES if entity.has is not None and entity.has(telemetry)}
        new = found - self._known
        self._known |= new
        return bool(new)

    def document(self) -> bytes:
        """The announcement in JSON."""
        id = f"wdmoe/{self._topics.cluster}/{self._node}"
        return msgspec.json.encode(
            {
                "device": {
                    "identifiers": [id], "name": self._node, "manufacturer": "WDMoE", "model": self._model,
                    "sw_version": __version__,
                },
                "origin": {"name": "wdmoe-node", "sw_version": __version__},
                "components": {e.key: self._component(e, id) for e in _ENTITIES if e.key in self._known},
            }
        )  # fmt: skip

    def _component(self, entity: _Entity, id: str) -> dict[str, Any]:
        status = self._topics.status(self._node)
        component = {
            "platform": entity.platform,
            "unique_id": f"{id}/{entity.key}",
            "name": entity.name,
            "state_topic": status if entity.has is None else self._topics.telemetry(self._node),
            "value_template": entity.value,
            **entity.options,
        }
        if entity.has is not None:
            # The status would hide them while the node is too hot to work, which is when they are of most interest.
            component["expire_after"] = _EXPIRES_S
        elif not entity.always:
            component["availability"] = [{"topic": status, "value_template": "{{ value_json.state }}"}]
        return component


def _topic_level(name: str) -> str:
    """A name as a level of a discovery topic, which may hold letters, digits, `_` and `-` only."""
    return name if "." not in name else f"{name.replace('.', '_')}-{zlib.crc32(name.encode()):08x}"
