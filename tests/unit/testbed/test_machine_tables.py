"""Samples of telemetry as rows of a run's tables."""

from bs_coordinator.nodes.telemetry_inbox import ReceivedTelemetry
from testbed.run_directory.machine_tables import SENSORS, sensor_rows
from tests.unit.wire.test_telemetry import SAMPLE


def test_sensors_are_rows_of_their_own() -> None:
    rows = SENSORS.build(sensor_rows(ReceivedTelemetry(1, 2, SAMPLE))).to_pylist()
    assert [tuple(row.values()) for row in rows] == [
        (1, 2, "pi1", "cpu_thermal temp1", "celsius", 48.3),
        (1, 2, "pi1", "VDD_IN", "volts", 5.0),
        (1, 2, "pi1", "VDD_IN", "amperes", 0.9),
        (1, 2, "pi1", "VDD_IN", "watts", 4.5),
    ]
