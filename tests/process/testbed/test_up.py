"""`wdmoe-testbed up` as a process: it answers, and leaves nothing running."""

import signal
import subprocess
from pathlib import Path

import psutil

from bs_coordinator.broker.processes import free_port
from tests.desk_fleet import desk_fleet
from tests.http_site import Caller
from tests.waiting import PATIENCE_S


def test_a_fleet_answers_until_a_signal_ends_all_its_processes(random_bundle: Path, tmp_path: Path) -> None:
    caller = Caller(free_port())
    with desk_fleet(random_bundle, caller.port, tmp_path) as fleet:
        children = psutil.Process(fleet.process.pid).children(recursive=True)
        assert sum("edge_node" in child.cmdline() for child in children) == 2
        status, _, body = caller.ask("POST", "/v1/completions", {"prompt": "Hello", "max_tokens": 4})
        assert (status, body["usage"]["completion_tokens"]) == (200, 4)
        second = subprocess.run(fleet.argv, stdin=subprocess.DEVNULL, capture_output=True, check=False)
        assert second.returncode == 45
        assert second.stderr.count(b"\n") == 1
        fleet.process.send_signal(signal.SIGTERM)
        assert fleet.process.wait(PATIENCE_S) == 0
        _, alive = psutil.wait_procs(children, timeout=PATIENCE_S)
        assert alive == []
    assert "Traceback" not in fleet.log.read_text()
