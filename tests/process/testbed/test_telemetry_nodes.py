"""Telemetry of real nodes in the tables of a run."""

from contextlib import closing
from typing import Any

import msgspec

from bs_coordinator.dispatch.dispatcher import Dispatcher
from bs_coordinator.nodes.registry import NodeRegistry
from testbed.experiment.recorder import Recorder
from testbed.local_nodes import LocalNodes
from tests.unit.wire.test_telemetry import SAMPLE
from tests.waiting import wait_until
from wire.manifest import load_manifest
from wire.status import NodeStatus
from wire.tensors import WireDtype
from wire.topics import Topics
from wire.transports import connect


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
        rows: list[dict[str, Any]] = []

        def rows_of_both(least: int) -> bool:
            dispatcher.pump(0.2)
            recorder.sample()
            tables = recorder.tables()
            rows[:] = tables["telemetry"].to_pylist() if "telemetry" in tables else []
            return all(sum(row["node"] == node for row in rows) >= least for node in ("a", "b"))

        wait_until(lambda: rows_of_both(1), "a sample of each node")
        # Invalid telemetry is not stored, and does not displace what is valid.
        transport.publish(topics.telemetry("a"), b'{"schema": 1}')
        transport.publish(topics.telemetry("a"), SAMPLE_OF_ANOTHER)
        wait_until(lambda: rows_of_both(3) and len(dispatcher.telemetry.dropped) == 2, "more samples of each node")
    assert dispatcher.telemetry.dropped == {"telemetry": 1, "node": 1}
    statuses: dict[str, NodeStatus] = dict(dispatcher.registry.nodes)
    for node in ("a", "b"):
        own = [row for row in rows if row["node"] == node]
        sequence = [row["sequence"] for row in own]
        assert sequence == sorted(set(sequence))  # a node that is busy leaves some out
        # One machine, so one clock: a sample is read before it arrives.
        assert all(row["unix_ns"] >= row["node_unix_ns"] for row in own)
        assert all(row["route"] == "lo" and row["load_1min"] >= 0 for row in own)
        assert statuses[node].online


SAMPLE_OF_ANOTHER = msgspec.json.encode(SAMPLE)
