"""What real node processes tell of themselves reaches the base station and a cell's tables."""

import time
from contextlib import closing

import msgspec

from bs_coordinator.dispatch.dispatcher import Dispatcher
from bs_coordinator.nodes.registry import NodeRegistry
from bs_coordinator.nodes.telemetry_inbox import ReceivedTelemetry
from testbed.experiment.recorder import Recorder
from testbed.local_nodes import LocalNodes
from testbed.run_directory.machine_tables import SENSORS, sensor_rows
from tests.unit.wire.test_telemetry import SAMPLE
from wire.manifest import load_manifest
from wire.status import NodeStatus
from wire.tensors import WireDtype
from wire.topics import Topics
from wire.transports import connect


def test_sensors_are_rows_of_their_own() -> None:
    rows = SENSORS.build(sensor_rows(ReceivedTelemetry(1, 2, SAMPLE))).to_pylist()
    assert [tuple(row.values()) for row in rows] == [
        (1, 2, "pi1", "cpu_thermal temp1", "celsius", 48.3),
        (1, 2, "pi1", "VDD_IN", "volts", 5.0),
        (1, 2, "pi1", "VDD_IN", "amperes", 0.9),
        (1, 2, "pi1", "VDD_IN", "watts", 4.5),
    ]


def test_samples_of_nodes_become_rows(fleet: LocalNodes) -> None:
    fleet.start("a", "L*:E0-3")
    fleet.start("b", "L*:E4-7")
    manifest = load_manifest(fleet.bundle)
    topics = Topics(fleet.cluster)
    with closing(connect(fleet.address, f"look-{fleet.cluster}")) as transport:
        dispatcher = Dispatcher(
            transport, topics, NodeRegistry(manifest.dims, manifest.model_sha256), dtype=WireDtype.FP32, timeout_s=5.0
        )
        recorder = Recorder(top_k=2, sample_s=1.0, telemetry=dispatcher.telemetry.drain)
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and set(dispatcher.telemetry.latest()) != {"a", "b"}:
            dispatcher.pump(0.2)
        # Neither is what no node may say taken, nor does it hide what is right.
        transport.publish(topics.telemetry("a"), b'{"schema": 1}')
        transport.publish(topics.telemetry("a"), SAMPLE_OF_ANOTHER)
        dispatcher.pump(2.5)
    recorder.sample()
    rows = recorder.tables()["telemetry"].to_pylist()
    assert dispatcher.telemetry.dropped == {"telemetry": 1, "node": 1}
    statuses: dict[str, NodeStatus] = dict(dispatcher.registry.nodes)
    for node in ("a", "b"):
        own = [row for row in rows if row["node"] == node]
        assert len(own) >= 2
        sequence = [row["sequence"] for row in own]
        assert sequence == sorted(set(sequence))
        # One machine, so one clock: a sample is read before it arrives, and not long before.
        assert all(0 <= row["unix_ns"] - row["node_unix_ns"] < 3e9 for row in own)
        assert all(row["route"] == "lo" and row["load_1min"] >= 0 for row in own)
        assert statuses[node].online


SAMPLE_OF_ANOTHER = msgspec.json.encode(SAMPLE)
