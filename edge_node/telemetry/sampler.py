"""Samples of a device's telemetry, put together from its tools and files.

What changes fast is read for each sample; what needs a process and hardly ever changes, every few seconds.
"""

import os
import re
from pathlib import Path

from edge_node.devices import board_model
from edge_node.telemetry import jetson, raspberry
from edge_node.telemetry.commands import Commands
from edge_node.telemetry.jetson import Tegra
from edge_node.telemetry.radio import Radio
from edge_node.telemetry.raspberry import PmicRail, Throttling
from edge_node.telemetry.route import route_interface
from edge_node.telemetry.sysfs import PROCESSOR, Files, Sensors, read_frequencies, read_sensors
from edge_node.telemetry.tegrastats import Tegrastats
from wire.telemetry import MAX_SENSORS, SCHEMA, Clocks, Power, Rail, Telemetry, Thermal

_SLOW_S = 5.0
"""Between two readings of what stays the same during an association; a new BSSID is a reason to read it at once."""
_MODE_S = 30.0
_PMIC_BOARDS = re.compile(r"Raspberry Pi (?:5|500|Compute Module 5)")


class TelemetrySampler:
    """Samples of one device. It keeps the counts of roaming between samples."""

    def __init__(
        self,
        node: str,
        boot_id: str,
        *,
        broker: tuple[str, int] | None = None,
        commands: Commands | None = None,
        root: Path = Path("/"),
    ) -> None:
        """Nothing is read yet.

        Args:
            broker: host and port; the route to it tells which interface traffic goes over.
            commands: the device's tools, and the clock.
            root: folder that holds /sys and /proc.
        """
        self._node, self._boot_id, self._broker = node, boot_id, broker
        self._root = root
        self._commands = commands or Commands()
        self._clock = self._commands.clock
        self._files = Files(root / "sys", clock=self._clock)
        self._model = board_model(root)
        self._sequence = 0
        self._radio = Radio(self._commands, root)
        self._tegrastats = Tegrastats(self._commands)
        self._route: str | None = None
        self._mode: str | None = None
        self._slow_due_s = self._mode_due_s = float("-inf")

    def close(self) -> None:
        """End the tools that run in the background."""
        self._tegrastats.close()

    def sample(self) -> Telemetry:
        """Read everything now; takes as long as the device's tools take."""
        unix_ns, began = self._clock.unix_ns(), self._clock.monotonic_s()
        if began >= self._slow_due_s:
            self._slow_due_s = began + _SLOW_S
            self._route = route_interface(*self._broker) if self._broker else None
            self._radio.read_settings(self._route)
        if began >= self._mode_due_s:
            self._mode_due_s = began + _MODE_S
            self._mode = self._commands.facts("nvpmodel", jetson.parse_power_mode, None, "nvpmodel", "-q")
        radio = self._radio.sample()
        files = self._files.read()
        sensors = self._commands.kept("sensors", read_sensors(files))
        tegra = self._tegra()
        sample = Telemetry(
            schema=SCHEMA,
            node=self._node,
            boot_id=self._boot_id,
            sequence=self._sequence,
            unix_ns=unix_ns,
            route=self._route,
            wifi=radio,
            thermal=self._thermal(sensors, tegra),
            power=self._power(sensors, tegra),
            clocks=self._clocks(files, tegra),
            warnings=dict(self._commands.warnings),
            sampling_ms=round(1e3 * (self._clock.monotonic_s() - began), 3),
        )
        self._sequence += 1
        return sample

    def _thermal(self, sensors: Sensors, tegra: Tegra) -> Thermal:
        celsius = {**sensors.celsius, **tegra.sensors_celsius}
        throttling = Throttling()
        if self._commands.find("vcgencmd"):
            throttling = self._commands.facts(
                "vcgencmd get_throttled", raspberry.parse_throttled, throttling, "vcgencmd", "get_throttled"
            )
            measured = self._commands.facts(
                "vcgencmd measure_temp", raspberry.parse_temperature, None, "vcgencmd", "measure_temp"
            )
            if measured is not None:
                celsius["soc"] = measured
        elif sensors.under_voltage is not None:
            throttling = Throttling(None, "under-voltage" if sensors.under_voltage else "", None)
        processor = [value for name, value in celsius.items() if PROCESSOR.search(name)]
        return Thermal(
            soc_celsius=max(processor, default=None),
            sensors_celsius=dict(list(celsius.items())[:MAX_SENSORS]),
            throttled_bits=throttling.bits,
            throttling_now=throttling.now,
            throttling_since_boot=throttling.since_boot,
            throttle_events=sensors.throttle_events,
        )

    def _power(self, sensors: Sensors, tegra: Tegra) -> Power:
        rails = {**{name: Rail(watts=watts) for name, watts in tegra.rails_watts.items()}, **sensors.rails}
        core_volts = supply_volts = None
        total = tegra.total_watts
        if self._commands.find("vcgencmd"):
            core_volts = self._commands.facts(
                "vcgencmd measure_volts", raspberry.parse_volts, None, "vcgencmd", "measure_volts", "core"
            )
            pmic: dict[str, PmicRail] = {}
            if _PMIC_BOARDS.search(self._model):
                pmic = self._commands.facts(
                    "vcgencmd pmic_read_adc", raspberry.parse_pmic, pmic, "vcgencmd", "pmic_read_adc"
                )
            supply_volts = pmic[raspberry.INPUT_RAIL].volts if raspberry.INPUT_RAIL in pmic else None
            rails.update({name: Rail(volts=r.volts, amperes=r.amperes, watts=r.watts) for name, r in pmic.items()})
            if watts := [rail.watts for rail in pmic.values() if rail.watts is not None]:
                total = round(sum(watts), 3), "sum of rails"
        for name in jetson.TOTAL_RAILS:
            if (known := sensors.rails.get(name)) is not None:
                supply_volts = known.volts
                if total is None and known.watts is not None:
                    total = known.watts, name
                break
        return Power(
            board_watts=total[0] if total else None,
            board_watts_from=total[1] if total else None,
            supply_volts=supply_volts,
            core_volts=core_volts,
            rails=dict(list(rails.items())[:MAX_SENSORS]),
            mode=self._mode,
        )

    def _clocks(self, files: dict[str, str], tegra: Tegra) -> Clocks:
        cores = self._commands.kept("cpufreq", read_frequencies(files))
        return Clocks(
            cpu_slowest_mhz=cores.slowest_mhz if cores.slowest_mhz else min(tegra.cpu_mhz, default=None),
            cpu_fastest_mhz=cores.fastest_mhz if cores.fastest_mhz else max(tegra.cpu_mhz, default=None),
            governor=cores.governor,
            load_1min=round(os.getloadavg()[0], 2),
            gpu_mhz=tegra.gpu_mhz,
            gpu_percent=tegra.gpu_percent,
            memory_percent=tegra.memory_percent,
        )

    def _tegra(self) -> Tegra:
        line = self._tegrastats.line()
        return Tegra() if line is None else self._commands.kept("tegrastats", jetson.parse_tegrastats(line))
