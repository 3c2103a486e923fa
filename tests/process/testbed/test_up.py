"""`wdmoe-testbed up` as a process: it answers, and leaves nothing running."""

import signal
import subprocess
import sys
from pathlib import Path

import psutil

from bs_coordinator.broker.processes import free_port
from tests.http_site import Caller
from tests.waiting import PATIENCE_S, wait_until


def test_a_fleet_answers_until_a_signal_ends_all_its_processes(random_bundle: Path, tmp_path: Path) -> None:
    caller = Caller(free_port())
    argv = [
        *(sys.executable, "-m", "testbed", "up", "--bundle", random_bundle, "--nodes", 2),
        *("--port", caller.port, "--runs", tmp_path),
    ]
    out, log = tmp_path / "out", tmp_path / "log"
    with out.open("wb") as stdout, log.open("wb") as stderr:
        fleet = subprocess.Popen([str(a) for a in argv], stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr)
    try:

        def ready() -> bool:
            assert fleet.poll() is None, log.read_text()
            return "Ctrl-C" in out.read_text()

        wait_until(ready, "the fleet")
        children = psutil.Process(fleet.pid).children(recursive=True)
        assert sum("edge_node" in child.cmdline() for child in children) == 2
        status, _, body = caller.ask("POST", "/v1/completions", {"prompt": "Hello", "max_tokens": 4})
        assert (status, body["usage"]["completion_tokens"]) == (200, 4)
        second = subprocess.run([str(a) for a in argv], stdin=subprocess.DEVNULL, capture_output=True, check=False)
        assert second.returncode == 45
        assert second.stderr.count(b"\n") == 1
        fleet.send_signal(signal.SIGTERM)
        assert fleet.wait(PATIENCE_S) == 0
        _, alive = psutil.wait_procs(children, timeout=PATIENCE_S)
        assert alive == []
    finally:
        fleet.kill()
    assert "Traceback" not in log.read_text()
