"""Node processes on this machine."""

import sys
from pathlib import Path

import psutil

from testbed.local_nodes import LocalNodes
from tests.waiting import wait_until
from wire.broker_address import BrokerAddress


def test_a_node_starts_again_as_it_was_started(random_bundle: Path, broker: BrokerAddress, tmp_path: Path) -> None:
    nodes = LocalNodes(random_bundle, broker, tmp_path, cluster="again")
    starts = []
    try:
        nodes.start(
            "a", "L*:E0", threads=2, options=["--residency", "lru"], python=(sys.executable, "-X", "utf8"),
            environment={"WDMOE_DEBUG": "1"},
        )  # fmt: skip
        for _ in range(2):
            process = psutil.Process(nodes.processes["a"].pid)
            # Where there is setpriv, it has become Python then.
            wait_until(lambda process=process: process.cmdline()[:1] == [sys.executable], "the node's program")  # type: ignore[misc]
            starts.append((process.cmdline(), process.environ()))
            nodes.stop()
            nodes.restart("a")
    finally:
        nodes.stop()
    assert starts[0] == starts[1]
    command, environment = starts[0]
    assert "utf8" in command
    assert environment["WDMOE_DEBUG"] == "1"
