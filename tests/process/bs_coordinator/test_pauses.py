"""The broker or the base station stands still for a while, nodes online all the while: nothing is lost but time."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bs_coordinator.broker.processes import free_port, mosquitto_path
from testbed.local_nodes import LocalNodes
from tests.needs import skip_without
from tests.process.bs_coordinator.test_serve import Server
from tests.waiting import PATIENCE_S, wait_until
from wire.broker_address import BrokerAddress
from wire.manifest import Scheme

pytestmark = pytest.mark.slow
PAUSE_S = 3.0
ASKED = {"prompt": "Hello", "max_tokens": 60}


@pytest.fixture
def mosquitto(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A broker of the test's own, as a process that can be stopped, and its port."""
    skip_without("mosquitto")
    port = free_port()
    config = tmp_path / "mosquitto.conf"
    config.write_text(f"listener {port} 127.0.0.1\nallow_anonymous true\nset_tcp_nodelay true\nuser root\n")
    process = subprocess.Popen([str(mosquitto_path()), "-c", config], stderr=subprocess.DEVNULL)
    yield process, port
    process.send_signal(signal.SIGCONT)
    process.kill()
    process.wait(PATIENCE_S)


def _pause(pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)
    time.sleep(PAUSE_S)
    os.kill(pid, signal.SIGCONT)


def _streamed(server: Server, disturb: Callable[[], None]) -> str:
    """The whole stream of an answer during which, after its first line, something happens."""
    connection, response = server.open("POST", "/v1/completions", {**ASKED, "stream": True})
    response.readline()
    disturb()
    rest = response.read().decode()
    connection.close()
    assert rest.rstrip().endswith("[DONE]")
    return rest


@pytest.fixture(params=[1, 2])
def fleet_of_its_own(
    mosquitto: tuple[subprocess.Popen[bytes], int], tiny_bundle: Callable[[Scheme], Path], tmp_path: Path,
    request: pytest.FixtureRequest,
) -> Iterator[LocalNodes]:  # fmt: skip
    """Each expert on `param` of four nodes."""
    fleet = LocalNodes(tiny_bundle("fp32"), BrokerAddress("127.0.0.1", mosquitto[1]), tmp_path / "nodes")
    for k in range(4):
        fleet.start(f"n{k}", "L*:E" + ",".join(str((2 * k + i) % 8) for i in range(2 * request.param)))
    yield fleet
    fleet.stop()


def test_answers_and_later_requests_survive_a_pause(
    mosquitto: tuple[subprocess.Popen[bytes], int], fleet_of_its_own: LocalNodes, tmp_path: Path
) -> None:
    broker, _ = mosquitto
    server = Server(fleet_of_its_own, tmp_path)
    try:
        expected = server.ask("POST", "/v1/completions", ASKED)[2]["choices"]
        for pid in (broker.pid, server.process.pid):
            stream = _streamed(server, lambda pid=pid: _pause(pid))  # type: ignore[misc]
            assert "error" not in stream
            status, _, body = server.ask("POST", "/v1/completions", ASKED)
            assert (status, body.get("choices")) == (200, expected), server.log.read_text()
            wait_until(server.healthy, "health to be well")
        log = server.log.read_text()
        assert "degraded" not in log
        assert "unexpected" not in log
    finally:
        server.process.send_signal(signal.SIGTERM)
        server.process.wait(PATIENCE_S)
