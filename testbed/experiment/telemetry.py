"""Rows of what nodes told of themselves: one per sample, and one per sensor and quantity of it."""

from collections.abc import Iterator

from bs_coordinator.nodes.telemetry_inbox import Arrived
from testbed.experiment.tables import CLOCKS, POWER, THERMAL, WIFI

Row = tuple[object, ...]


def telemetry_row(arrived: Arrived) -> Row:
    """The row of `telemetry`."""
    sample = arrived.telemetry
    wifi = [getattr(sample.wifi, name) if sample.wifi else None for name, _ in WIFI]
    rest = [
        getattr(part, name)
        for part, columns in ((sample.thermal, THERMAL), (sample.power, POWER), (sample.clocks, CLOCKS))
        for name, _ in columns
    ]
    return (
        *(arrived.unix_ns, arrived.monotonic_ns, sample.node, sample.sequence, sample.unix_ns, sample.sampling_ms),
        *(sample.route, *wifi, *rest, sum(sample.warnings.values())),
    )


def sensor_rows(arrived: Arrived) -> Iterator[Row]:
    """Rows of `sensors`."""
    sample = arrived.telemetry
    when = arrived.unix_ns, arrived.monotonic_ns, sample.node
    for sensor, celsius in sample.thermal.sensors_celsius.items():
        yield *when, sensor, "celsius", celsius
    for rail, measured in sample.power.rails.items():
        for quantity in ("volts", "amperes", "watts"):
            if (value := getattr(measured, quantity)) is not None:
                yield *when, rail, quantity, value
