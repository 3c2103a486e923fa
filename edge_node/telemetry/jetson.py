"""Parsers of a Jetson's `tegrastats` and `nvpmodel -q`. Pure."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from edge_node.telemetry.parsed import Parsed

_TEMPERATURE = re.compile(r"(?<!\S)([A-Za-z][\w-]*)@(-?\d{1,4}(?:\.\d{1,6})?)C(?!\S)")
_RAIL = re.compile(r"(?<!\S)([A-Za-z]\w*) (\d{1,7})(?:mW)?/(\d{1,7})(?:mW)?(?:/\S*)?(?!\S)")
_CPUS = re.compile(r"(?<!\S)CPU \[([^\]]*)\]")
_CORE_MHZ = re.compile(r"\d{1,3}%@(\d{1,6})\b")
_GPU = re.compile(r"(?<!\S)GR3D_FREQ (?:(\d{1,3})%)?(?:@\[?(\d{1,6}(?:,\d{1,6})*)\]?)?(?!\S)")
"""Load and clock, of Thor one clock for each of its graphics clusters."""
_MEMORY = re.compile(r"(?<!\S)EMC_FREQ (\d{1,3})%")
_OFF_CELSIUS = -200.0
"""Sensors of units without power read -256."""
_PMIC_PLACEHOLDER = ("PMIC", 100.0)
"""Older boards print this constant instead of a measurement."""
_UNUSED = "NC"
TOTAL_RAILS = ("VDD_IN", "POM_5V_IN", "VIN")
"""Rails that feed the whole module or board: of Orin Nano, NX and Xavier NX; of Nano; of Thor."""
PART_OF_ANOTHER = frozenset({"VDDQ_VDD2_1V8AO"})
"""Rails fed from another measured rail (AGX Orin: VIN_SYS_5V0): to add them would count them twice."""


@dataclass(frozen=True, slots=True)
class Tegra:
    """One line of `tegrastats`."""

    sensors_celsius: Mapping[str, float] = field(default_factory=dict)
    rails_watts: Mapping[str, float] = field(default_factory=dict)
    cpu_mhz: tuple[float, ...] = ()
    gpu_percent: float | None = None
    gpu_mhz: float | None = None
    memory_percent: float | None = None

    @property
    def total_watts(self) -> tuple[float, str] | None:
        """Power of the whole module in watts, and its source: an input rail's name, or `sum of rails`.

        None if no rail is measured. Rails that are fed from another one are not added.
        """
        for rail in TOTAL_RAILS:
            if rail in self.rails_watts:
                return self.rails_watts[rail], rail
        parts = [watts for rail, watts in self.rails_watts.items() if rail not in PART_OF_ANOTHER]
        return (round(sum(parts), 3), "sum of rails") if parts else None


def parse_tegrastats(line: str) -> Parsed[Tegra]:
    """Facts from one line of `tegrastats`."""
    if not re.search(r"(?<!\S)RAM \S+/\S+", line):
        return Parsed(Tegra(), f"not a line of tegrastats: {line[:80]!r}")
    temperatures = {
        name: float(celsius)
        for name, celsius in _TEMPERATURE.findall(line)
        if float(celsius) > _OFF_CELSIUS and (name, float(celsius)) != _PMIC_PLACEHOLDER
    }
    rails = {name: int(now) / 1000 for name, now, _ in _RAIL.findall(line) if name != _UNUSED}
    cpus, gpu, memory = _CPUS.search(line), _GPU.search(line), _MEMORY.search(line)
    gpu_mhz = max(float(mhz) for mhz in gpu[2].split(",")) if gpu and gpu[2] else None
    facts = Tegra(
        sensors_celsius=temperatures,
        rails_watts=rails,
        cpu_mhz=tuple(float(mhz) for mhz in _CORE_MHZ.findall(cpus[1])) if cpus else (),
        gpu_percent=float(gpu[1]) if gpu and gpu[1] else None,
        gpu_mhz=gpu_mhz,
        memory_percent=float(memory[1]) if memory else None,
    )
    # Temperatures are near the end of every line: a line without them was cut off.
    return Parsed(facts, "" if temperatures and cpus else f"cut off after {line.rstrip()[-40:]!r}")


def parse_power_mode(text: str) -> Parsed[str | None]:
    """Name of the power mode in the output of `nvpmodel -q`, without `MODE_`."""
    match = re.search(r"^NV Power Mode: (\S(?:.*\S)?)\s*$", text, re.MULTILINE)
    if match is None:
        return Parsed(None, f"no power mode: {text[:80]!r}")
    return Parsed(match[1].removeprefix("MODE_")[:64])
