"""What a Jetson says (`tegrastats`, `nvpmodel -q`). Pure."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from edge_node.telemetry.parsed import Parsed

_TEMPERATURE = re.compile(r"(?<!\S)([A-Za-z][\w-]*)@(-?\d+(?:\.\d+)?)C(?!\S)")
_RAIL = re.compile(r"(?<!\S)([A-Za-z]\w*) (\d{1,7})(?:mW)?/(\d{1,7})(?:mW)?(?!\S)")
_CPUS = re.compile(r"(?<!\S)CPU \[([^\]]*)\]")
_CORE_MHZ = re.compile(r"\d+%@(\d+)")
_GPU = re.compile(r"(?<!\S)GR3D_FREQ (\d+)%(?:@\[?(\d+)(?:,(\d+))?\]?)?(?!\S)")
_MEMORY = re.compile(r"(?<!\S)EMC_FREQ (\d+)%")
_OFF_CELSIUS = -200.0
"""Sensors of units without power read -256."""
_PMIC_PLACEHOLDER = ("PMIC", 100.0)
"""Not measured: older boards print this constant."""
_UNUSED = "NC"
TOTAL_RAILS = ("VDD_IN", "POM_5V_IN", "VIN")
"""Inputs of the module or board, where one is measured: Orin Nano, NX and Xavier NX; Nano; Thor."""
PART_OF_ANOTHER = frozenset({"VDDQ_VDD2_1V8AO"})
"""Fed from a rail that is measured as well (AGX Orin: VIN_SYS_5V0), so that adding it would count it twice."""


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
        """Of the whole module and how it is known: the input rail's, or the sum of those that are not part of
        another."""
        for rail in TOTAL_RAILS:
            if rail in self.rails_watts:
                return self.rails_watts[rail], rail
        parts = [watts for rail, watts in self.rails_watts.items() if rail not in PART_OF_ANOTHER]
        return (round(sum(parts), 3), "sum of rails") if parts else None


def parse_tegrastats(line: str) -> Parsed[Tegra]:
    """Facts of one line of `tegrastats`."""
    if not re.search(r"(?<!\S)RAM \d+/\d+MB", line):
        return Parsed(Tegra(), f"not a line of tegrastats: {line[:80]!r}")
    temperatures = {
        name: float(celsius)
        for name, celsius in _TEMPERATURE.findall(line)
        if float(celsius) > _OFF_CELSIUS and (name, float(celsius)) != _PMIC_PLACEHOLDER
    }
    rails = {name: int(now) / 1000 for name, now, _ in _RAIL.findall(line) if name != _UNUSED}
    cpus, gpu, memory = _CPUS.search(line), _GPU.search(line), _MEMORY.search(line)
    gpu_mhz = max((float(mhz) for mhz in gpu.groups()[1:] if mhz), default=None) if gpu else None
    facts = Tegra(
        sensors_celsius=temperatures,
        rails_watts=rails,
        cpu_mhz=tuple(float(mhz) for mhz in _CORE_MHZ.findall(cpus[1])) if cpus else (),
        gpu_percent=float(gpu[1]) if gpu else None,
        gpu_mhz=gpu_mhz,
        memory_percent=float(memory[1]) if memory else None,
    )
    # Temperatures stand near the end of every line; one without them was cut.
    return Parsed(facts, "" if temperatures and cpus else f"cut off after {line.rstrip()[-40:]!r}")


def parse_power_mode(text: str) -> Parsed[str | None]:
    """Name of the power mode that `nvpmodel -q` tells, without `MODE_`."""
    match = re.search(r"^NV Power Mode: (\S+)$", text, re.MULTILINE)
    if match is None:
        return Parsed(None, f"no power mode: {text[:80]!r}")
    return Parsed(match[1].removeprefix("MODE_")[:64])
