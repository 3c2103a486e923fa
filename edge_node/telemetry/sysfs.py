"""Sensors and clocks that the kernel shows as files: hwmon (with INA3221), thermal zones, cpufreq.

`Files` finds and reads the files. The functions are pure: there is one for each class of device below /sys.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from common.clock import SYSTEM_CLOCK, Clock
from edge_node.telemetry.parsed import Parsed
from wire.telemetry import MAX_SENSORS, Rail

PROCESSOR = re.compile(r"cpu|soc|core|k10|zen|acpi|therm", re.IGNORECASE)
"""Names of sensors that belong to the processor."""

_PATTERNS = (
    "class/hwmon/hwmon*/name",
    "class/hwmon/hwmon*/*_label",
    "class/hwmon/hwmon*/temp*_input",
    "class/hwmon/hwmon*/in*_input",
    "class/hwmon/hwmon*/in*_alarm",
    "class/hwmon/hwmon*/curr*_input",
    "class/hwmon/hwmon*/power*_input",
    "class/hwmon/hwmon*/oc*_event_cnt",
    "class/thermal/thermal_zone*/type",
    "class/thermal/thermal_zone*/temp",
    "devices/system/cpu/cpu[0-9]*/cpufreq/scaling_cur_freq",
    "devices/system/cpu/cpu[0-9]*/cpufreq/scaling_governor",
    "devices/system/cpu/cpu[0-9]*/thermal_throttle/core_throttle_count",
)
_CONSTANT = re.compile(r"(?:name|type|_label)$")
_LOOK_AGAIN_S = 60.0
_MOST_BYTES = 256
_CELSIUS = -60.0, 200.0
_OFF_CELSIUS = -200.0
"""Sensors of units without power read -256 °C."""
_HWMON = re.compile(r"class/hwmon/(hwmon\d+)/(temp|in|curr|power)(\d+)_input")
_UNITS = {"temp": 1e-3, "in": 1e-3, "curr": 1e-3, "power": 1e-6}
"""°C, V, A and W per unit of hwmon, which counts in m°C, mV, mA and µW (Documentation/hwmon/sysfs-interface)."""
_INA3221 = "ina3221"
_INA3221_CHANNELS = 3
"""Inputs beyond the three channels are shunt voltages and sums."""


_RAIL_UNITS = {"in": "volts", "curr": "amperes", "power": "watts"}
_HWMON_NAME = re.compile(r"class/hwmon/\w+/name")
_ZONE = re.compile(r"(class/thermal/thermal_zone\d+)/temp")


@dataclass(frozen=True, slots=True)
class Hwmon:
    """Sensors of the class hwmon.

    Attributes:
        celsius: temperatures by chip and label.
        rails: supply rails by label.
    """

    celsius: Mapping[str, float] = field(default_factory=dict)
    rails: Mapping[str, Rail] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Sensors:
    """Temperatures and rails of a device.

    Attributes:
        celsius: temperatures by name, at most `MAX_SENSORS`.
        rails: supply rails by name, at most `MAX_SENSORS`.
        under_voltage: a Raspberry Pi's alarm; None on other devices.
        throttle_events: counted by the kernel since boot; None if it does not count them.
    """

    celsius: Mapping[str, float] = field(default_factory=dict)
    rails: Mapping[str, Rail] = field(default_factory=dict)
    under_voltage: bool | None = None
    throttle_events: int | None = None


@dataclass(frozen=True, slots=True)
class Frequencies:
    """Clocks of the cores that are online, and their governors, separated by commas."""

    slowest_mhz: float | None = None
    fastest_mhz: float | None = None
    governor: str | None = None


class Files:
    """The files of sensors and clocks below /sys."""

    def __init__(self, root: Path = Path("/sys"), *, clock: Clock = SYSTEM_CLOCK) -> None:
        """Nothing is read yet.

        Args:
            root: the /sys to read.
            clock: says when to look for new files.
        """
        self._root = root
        self._clock = clock
        self._paths: list[Path] = []
        self._constants: dict[Path, str] = {}
        self._looked_s = float("-inf")

    def read(self) -> dict[str, str]:
        """Contents by path below the root.

        Files that can't be read are left out: the sensor of a unit without power, or of a device that was removed.
        """
        now_s = self._clock.monotonic_s()
        if now_s - self._looked_s >= _LOOK_AGAIN_S:
            self._looked_s = now_s
            self._paths = [path for pattern in _PATTERNS for path in sorted(self._root.glob(pattern))]
            self._constants.clear()
        return {
            str(path.relative_to(self._root)): text for path in self._paths if (text := self._text(path)) is not None
        }

    def _text(self, path: Path) -> str | None:
        if path in self._constants:
            return self._constants[path]
        try:
            with path.open("rb") as file:
                text = file.read(_MOST_BYTES).decode(errors="replace").strip()
        except OSError:
            return None
        if _CONSTANT.search(path.name):
            self._constants[path] = text
        return text


def read_sensors(files: Mapping[str, str]) -> Parsed[Sensors]:
    """Temperatures, rails, alarms and counters from the contents of `Files`."""
    hwmon, zones = read_hwmon(files), read_thermal_zones(files)
    celsius = {**hwmon.facts.celsius, **zones.facts}
    sensors = Sensors(
        celsius=dict(list(celsius.items())[:MAX_SENSORS]),
        rails=dict(list(hwmon.facts.rails.items())[:MAX_SENSORS]),
        under_voltage=read_under_voltage(files),
        throttle_events=read_throttle_events(files),
    )
    return Parsed(sensors, hwmon.complaint or zones.complaint)


def read_hwmon(files: Mapping[str, str]) -> Parsed[Hwmon]:
    """Temperatures and rails of hwmon chips. Rails with volts and amperes but no watts get their product."""
    complaint = ""
    celsius: dict[str, float] = {}
    rails: dict[str, dict[str, float]] = {}
    for path, text in files.items():
        match = _HWMON.fullmatch(path)
        if match is None:
            continue
        device, quantity, number = f"class/hwmon/{match[1]}", match[2], match[3]
        chip = files.get(f"{device}/name", match[1])
        if chip == _INA3221 and int(number) > _INA3221_CHANNELS:
            continue
        value = _number(text)
        if value is None or (quantity == "temp" and not _CELSIUS[0] <= value * _UNITS[quantity] <= _CELSIUS[1]):
            complaint = complaint or f"{path}: {text[:40]!r}"
            continue
        value = round(value * _UNITS[quantity], 6)
        own_label = files.get(f"{device}/{quantity}{number}_label")
        if quantity == "temp":
            celsius[_free(celsius, f"{chip} {own_label or f'temp{number}'}")] = value
        else:
            # The voltage and current of a channel share a label, which INA3221 gives to the voltage.
            label = own_label or files.get(f"{device}/in{number}_label", f"{chip} {number}")
            rails.setdefault(label[:64], {}).setdefault(_RAIL_UNITS[quantity], value)
    return Parsed(Hwmon(celsius, {name: _rail(values) for name, values in rails.items()}), complaint)


def read_thermal_zones(files: Mapping[str, str]) -> Parsed[dict[str, float]]:
    """Temperatures in °C of thermal zones that are not shown as hwmon as well."""
    shown = {text.replace("-", "_") for path, text in files.items() if _HWMON_NAME.fullmatch(path)}
    celsius: dict[str, float] = {}
    complaint = ""
    for path, text in files.items():
        match = _ZONE.fullmatch(path)
        if match is None:
            continue
        name = files.get(f"{match[1]}/type", match[1].rpartition("/")[2])
        if name.replace("-", "_") in shown:
            continue
        value = _number(text)
        if value is not None and value / 1e3 < _OFF_CELSIUS:
            continue
        if value is None or not _CELSIUS[0] <= value / 1e3 <= _CELSIUS[1]:
            complaint = complaint or f"{path}: {text[:40]!r}"
            continue
        celsius[_free(celsius, name)] = value / 1e3
    return Parsed(celsius, complaint)


def read_under_voltage(files: Mapping[str, str]) -> bool | None:
    """Whether a Raspberry Pi's voltage alarm is on; None on other devices."""
    alarms = [text for path, text in files.items() if path.endswith("_alarm") and _chip(files, path) == "rpi_volt"]
    return any(alarm != "0" for alarm in alarms) if alarms else None


def read_throttle_events(files: Mapping[str, str]) -> int | None:
    """Throttling events since boot, of all counters together; None if there are no counters."""
    counts = [_number(text) for path, text in files.items() if path.endswith(("_throttle_count", "_event_cnt"))]
    return int(sum(count for count in counts if count is not None and count >= 0)) if counts else None


def read_frequencies(files: Mapping[str, str]) -> Parsed[Frequencies]:
    """Clocks and governors of the cores."""
    texts = [text for path, text in files.items() if path.endswith("/scaling_cur_freq")]
    khz = [value for text in texts if (value := _number(text)) is not None and value > 0]
    governors = sorted({text for path, text in files.items() if path.endswith("/scaling_governor")})
    facts = Frequencies(
        slowest_mhz=min(khz) / 1e3 if khz else None,
        fastest_mhz=max(khz) / 1e3 if khz else None,
        governor=", ".join(governors)[:64] or None,
    )
    return Parsed(facts, "" if len(khz) == len(texts) else f"no frequency: {texts[0][:40]!r}")


def _rail(values: Mapping[str, float]) -> Rail:
    volts, amperes, watts = (values.get(unit) for unit in ("volts", "amperes", "watts"))
    if watts is None and volts is not None and amperes is not None:
        watts = round(volts * amperes, 6)
    return Rail(volts=volts, amperes=amperes, watts=watts)


def _chip(files: Mapping[str, str], path: str) -> str:
    return files.get(f"{path.rpartition('/')[0]}/name", "")


def _free(taken: Mapping[str, float], name: str) -> str:
    """`name`, followed by a number if it is taken: two cards may have the same sensor."""
    name = name[:60]
    return next(n for i in range(len(taken) + 1) if (n := f"{name} {i + 1}" if i else name) not in taken)


def _number(text: str) -> float | None:
    return float(text) if re.fullmatch(r"-?\d{1,15}", text) else None
