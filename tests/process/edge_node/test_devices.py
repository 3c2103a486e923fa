"""A node that is started with a device that it does not have."""

from contextlib import closing

import msgspec
import pytest

from edge_node.experts.providers import unavailable
from testbed.local_nodes import LocalNodes
from tests.waiting import wait_until
from wire.status import NodeStatus
from wire.topics import Topics
from wire.transports import connect


@pytest.mark.skipif(not unavailable("cuda"), reason="this onnxruntime has CUDA")
def test_a_node_without_cuda_serves_with_the_cpu_and_gives_the_reason(fleet: LocalNodes) -> None:
    fleet.start("g", "L*:E0", options=["--profile", "jetson-orin", "--provider", "cuda"])
    status = _status(fleet, "g")
    assert status.device is not None
    assert (status.device.profile, status.device.because, status.device.provider) == (
        "jetson-orin",
        "as configured",
        "cpu",
    )
    assert "has no CUDAExecutionProvider" in status.device.provider_reason
    log = fleet.log_path("g").read_text()
    assert "not computing with cuda: this onnxruntime has no CUDAExecutionProvider" in log
    assert "profile jetson-orin (as configured)" in log


def _status(fleet: LocalNodes, node: str) -> NodeStatus:
    with closing(connect(fleet.address, f"look-{fleet.cluster}")) as transport:
        transport.subscribe(Topics(fleet.cluster).status(node), qos=1)

        def online() -> NodeStatus | None:
            message = transport.receive(0.2)
            fleet.check()
            status = msgspec.json.decode(message.payload, type=NodeStatus) if message else None
            return status if status and status.online else None

        status = wait_until(online, "the node", poll_s=0)
        assert status is not None
        return status
