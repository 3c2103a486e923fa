"""Which threads of a running system have real-time priority: one of each node, the broker, the one that generates."""

import contextlib
import os
from pathlib import Path

import psutil
import pytest

from bs_coordinator.base_station import open_base_station
from bs_coordinator.broker.processes import open_broker
from bs_coordinator.config import BaseStationConfig, SamplingConfig
from common import real_time
from common.real_time import Priority
from testbed.local_nodes import local_nodes

REFUSED = real_time.why_not()
pytestmark = pytest.mark.skipif(bool(REFUSED), reason=f"no real-time priority here: {REFUSED}")


def _raised(process: int) -> list[int]:
    """Ids of a process' threads with real-time priority."""
    found = []
    for task in Path(f"/proc/{process}/task").iterdir():
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            if os.sched_getscheduler(int(task.name)) & ~os.SCHED_RESET_ON_FORK == os.SCHED_RR:
                found.append(int(task.name))
    return found


@pytest.mark.parametrize("priority", ["auto", "normal"])
def test_one_thread_of_each_process_that_a_token_waits_for(
    random_bundle: Path, tmp_path: Path, priority: Priority
) -> None:
    config = BaseStationConfig(bundle=random_bundle, draft="none", priority=priority)
    options = ["--priority", priority]
    with (
        open_broker("embedded", priority=priority) as address,
        local_nodes(random_bundle, address, tmp_path, {"a": "L*:E*"}, threads=2, options=options) as nodes,
        open_base_station(config, address) as station,
    ):
        node = nodes.processes["a"].pid
        brokers = [p.pid for p in psutil.Process().children() if "bs_coordinator.broker.embedded" in p.cmdline()]
        assert len(brokers) == 1
        assert _raised(node) == ([node] if priority == "auto" else [])
        assert _raised(brokers[0]) == (brokers if priority == "auto" else [])
        assert [_raised(child.pid) for child in psutil.Process(node).children()] == [[]]  # telemetry
        assert station.model.raises_priority == (priority == "auto")
        status = station.dispatcher.registry.nodes["a"]
        assert status.device is not None
        assert status.device.real_time == (priority == "auto")
        assert list(station.new_sequence().generate([1, 2, 3], SamplingConfig(max_tokens=3)))
    assert not _raised(os.getpid())
