"""Limits beyond which a device takes no work: temperature and free memory."""

from collections.abc import Callable

import psutil

from common.memory import available_bytes
from edge_node.telemetry.sysfs import PROCESSOR

_COOLER_CELSIUS = 5.0
_MORE_MEMORY = 1.25


class DeviceLimits:
    """Limits of one device. After one was exceeded, a margin must be regained, so that the node's state does not
    flap."""

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
            max_celsius: highest temperature; no limit if None, or if the device has no sensor.
            min_available_bytes: least RAM available.
            read_celsius: returns the present temperature; `processor_celsius` if None.
            read_available_bytes: returns the RAM available now.
        """
        self._max_celsius = max_celsius
        self._min_available_bytes = min_available_bytes
        self._read_celsius = read_celsius or processor_celsius
        self._read_available_bytes = read_available_bytes
        self._unfit = ""

    def unfit(self) -> str:
        """Why the device takes no work now; empty if it does."""
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
    """Temperature of the processor's hottest sensor; None if it has none."""
    sensors = psutil.sensors_temperatures() if hasattr(psutil, "sensors_temperatures") else {}
    found = [
        reading.current
        for name, readings in sensors.items()
        for reading in readings
        if PROCESSOR.search(f"{name} {reading.label}")
    ]
    return max(found, default=None)
