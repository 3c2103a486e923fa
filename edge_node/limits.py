"""When a device should rather not compute: too hot, or short of memory."""

from collections.abc import Callable

import psutil

from edge_node.experts.memory import available_bytes
from edge_node.telemetry.sysfs import PROCESSOR

_COOLER_CELSIUS = 5.0
_MORE_MEMORY = 1.25


class Limits:
    """What a device must stay within to take work; with a margin on the way back, so that it does not flap."""

    def __init__(
        self,
        *,
        max_celsius: float | None = None,
        min_available_bytes: int = 0,
        read_celsius: Callable[[], float | None] | None = None,
        read_available_bytes: Callable[[], int] = available_bytes,
    ) -> None:
        """Nothing is measured yet.

        Args:
            max_celsius: None for no limit; none either where no sensor tells.
        """
        self._max_celsius = max_celsius
        self._min_available_bytes = min_available_bytes
        self._read_celsius = read_celsius or processor_celsius
        self._read_available_bytes = read_available_bytes
        self._unfit = ""

    def unfit(self) -> str:
        """Why no work should come now; empty when fit."""
        margin_celsius, factor = (_COOLER_CELSIUS, _MORE_MEMORY) if self._unfit else (0.0, 1.0)
        celsius = self._read_celsius() if self._max_celsius is not None else None
        available = self._read_available_bytes()
        if celsius is not None and self._max_celsius is not None and celsius > self._max_celsius - margin_celsius:
            self._unfit = f"too hot: {celsius:.0f} °C, the limit is {self._max_celsius:.0f}"
        elif available < factor * self._min_available_bytes:
            limit = self._min_available_bytes >> 20
            self._unfit = f"short of memory: {available >> 20} MiB available, the limit is {limit}"
        else:
            self._unfit = ""
        return self._unfit


def processor_celsius() -> float | None:
    """The hottest sensor of the processor, None where there is none."""
    sensors = psutil.sensors_temperatures() if hasattr(psutil, "sensors_temperatures") else {}
    found = [
        reading.current
        for name, readings in sensors.items()
        for reading in readings
        if PROCESSOR.search(f"{name} {reading.label}")
    ]
    return max(found, default=None)
