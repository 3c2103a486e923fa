"""Home Assistant's rules for announced devices, and its way of reading values, written down from its documentation.

Sources: https://www.home-assistant.io/integrations/mqtt/ (topics, device discovery), and beside it
sensor/#device-class, binary_sensor/#device-class (units and classes) and sensor.mqtt/ (options).
"""

import json
import re
from typing import Any

from jinja2 import StrictUndefined
from jinja2.sandbox import ImmutableSandboxedEnvironment

TOPIC = re.compile(r"(?P<prefix>.+)/device/(?:[a-zA-Z0-9_-]+/)?[a-zA-Z0-9_-]+/config")
UNITS: dict[str, set[str]] = {
    "data_rate": {"bit/s", "kbit/s", "Mbit/s", "Gbit/s", "B/s", "kB/s", "MB/s", "GB/s", "KiB/s", "MiB/s", "GiB/s"},
    "data_size": {"bit", "kbit", "Mbit", "Gbit", "B", "kB", "MB", "GB", "TB", "KiB", "MiB", "GiB", "TiB"},
    "power": {"mW", "W", "kW", "MW", "GW", "TW"},
    "signal_strength": {"dB", "dBm"},
    "temperature": {"°C", "°F", "K"},
    "voltage": {"V", "mV", "µV", "kV", "MV"},
}
"""Units that Home Assistant allows for the device classes of sensors."""
BINARY_CLASSES = {"connectivity", "heat", "problem", "running"}
_COMMON = {
    "platform", "unique_id", "name", "state_topic", "value_template", "device_class", "entity_category", "expire_after",
    "availability",
}  # fmt: skip
OPTIONS = {"sensor": _COMMON | {"unit_of_measurement", "state_class"}, "binary_sensor": _COMMON}
STATE_CLASSES = {"measurement", "total", "total_increasing"}

_environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined)


def check_announcement(topic: str, payload: bytes) -> dict[str, Any]:
    """The components of an announcement, which keeps Home Assistant's rules."""
    assert TOPIC.fullmatch(topic), topic
    document = json.loads(payload)
    assert set(document) == {"device", "origin", "components"}
    assert document["origin"]["name"]
    assert document["device"]["identifiers"]
    assert set(document["device"]) <= {"identifiers", "name", "manufacturer", "model", "sw_version"}
    components: dict[str, Any] = document["components"]
    ids = [component["unique_id"] for component in components.values()]
    assert len(set(ids)) == len(ids)
    assert len({component["name"] for component in components.values()}) == len(ids)
    for component in components.values():
        _check_component(component)
    return components


def _check_component(component: dict[str, Any]) -> None:
    platform = component["platform"]
    assert set(component) <= OPTIONS[platform], component
    assert {"unique_id", "name", "state_topic", "value_template"} <= set(component)
    assert component.get("entity_category") in (None, "diagnostic")
    device_class, unit = component.get("device_class"), component.get("unit_of_measurement")
    if platform == "binary_sensor":
        assert device_class in BINARY_CLASSES
    elif device_class:
        assert unit in UNITS[device_class]
    if "state_class" in component:
        assert component["state_class"] in STATE_CLASSES
    for entry in component.get("availability", []):
        assert set(entry) <= {"topic", "value_template", "payload_available", "payload_not_available"}
        assert entry["topic"]


def render(template: str, payload: bytes) -> str:
    """What Home Assistant makes of a message; a value that is not defined, of which it would warn, is an error."""
    return _environment.from_string(template).render(value=payload.decode(), value_json=json.loads(payload)).strip()


def values(components: dict[str, Any], messages: dict[str, bytes]) -> dict[str, str]:
    """The state of each component after the messages, by topic; `unavailable` as Home Assistant shows it."""
    found = {}
    for key, component in components.items():
        available = [render(a["value_template"], messages[a["topic"]]) for a in component.get("availability", [])]
        assert set(available) <= {"online", "offline"}  # the payloads that Home Assistant expects by default
        value = render(component["value_template"], messages[component["state_topic"]])
        assert len(value) <= 255
        assert component["platform"] == "sensor" or value in ("ON", "OFF")
        if component.get("state_class"):
            assert value == "None" or re.fullmatch(r"-?\d+(\.\d+)?", value), value
        found[key] = "unavailable" if "offline" in available else value
    return found
