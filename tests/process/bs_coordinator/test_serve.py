"""`wdmoe-bs serve` as a process on real nodes: the command line's answers, lost nodes, the end by a signal."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bs_coordinator.broker.processes import free_port, open_broker
from testbed.local_nodes import LocalNodes
from tests.http_site import Caller
from tests.in_process import run_in_process
from tests.waiting import PATIENCE_S, wait_until
from wire.manifest import Scheme

KEY = "open sesame"


class Server(Caller):
    """A running `wdmoe-bs serve`."""

    def __init__(self, fleet: LocalNodes, folder: Path) -> None:
        super().__init__(free_port(), KEY)
        key = folder / "key"
        key.write_text(KEY)
        key.chmod(0o600)
        self.log = folder / "serve.log"
        argv = [
            sys.executable, "-m", "bs_coordinator", "serve", "--bundle", fleet.bundle, "--broker", fleet.address,
            "--cluster", fleet.cluster, "--port", self.port, "--api-key-file", key, "--nodes-timeout", PATIENCE_S,
            "--layer-timeout", PATIENCE_S,
        ]  # fmt: skip
        with self.log.open("wb") as log:
            self.process = subprocess.Popen([str(a) for a in argv], stdin=subprocess.DEVNULL, stderr=log)
        wait_until(self._ready, "the server")

    def healthy(self) -> bool:
        """Whether it says so."""
        return self.ask("GET", "/health")[0] == 200

    def _ready(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        try:
            return self.healthy()
        except OSError:
            return False


@pytest.fixture
def server(fleet: LocalNodes, tmp_path: Path) -> Iterator[Server]:
    for k in range(4):
        fleet.start(f"n{k}", f"L*:E{k},{k + 4}")
    server = Server(fleet, tmp_path)
    yield server
    server.process.send_signal(signal.SIGTERM)
    try:
        server.process.wait(PATIENCE_S)
    finally:
        server.process.kill()
    assert "Traceback" not in server.log.read_text()


def test_answers_are_those_of_the_command_line(server: Server, fleet: LocalNodes) -> None:
    common = ["--bundle", fleet.bundle, "--broker", fleet.address, "--cluster", fleet.cluster, "--max-tokens", 12]
    plain = run_in_process("bs_coordinator", "generate", *common, "--prompt", "Hello", "--raw")
    assert plain.returncode == 0, plain.stderr
    status, _, body = server.ask("POST", "/v1/completions", {"prompt": "Hello", "max_tokens": 12})
    assert status == 200
    assert body["choices"][0]["text"] == plain.stdout.rstrip("\n")
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["usage"]["completion_tokens"] == 12
    chatted = run_in_process("bs_coordinator", "generate", *common, "--prompt", "Hello")
    asked = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 12}
    status, _, body = server.ask("POST", "/v1/chat/completions", asked)
    assert status == 200
    assert body["choices"][0]["message"]["content"] == chatted.stdout.rstrip("\n")
    streamed = {**asked, "stream": True, "stream_options": {"include_usage": True}}
    lines = server.text("POST", "/v1/chat/completions", streamed)[2].split("\n\n")
    *pieces, account, done = (line.removeprefix("data: ") for line in lines if line)
    assert done == "[DONE]"
    deltas = [json.loads(piece)["choices"][0]["delta"]["content"] for piece in pieces]
    assert "".join(deltas) == chatted.stdout.rstrip("\n")
    assert json.loads(account)["usage"] == body["usage"]


def test_health_fails_while_experts_are_lost(server: Server, fleet: LocalNodes) -> None:
    assert server.healthy()
    fleet.processes["n1"].terminate()
    fleet.processes["n1"].wait(PATIENCE_S)
    wait_until(lambda: not server.healthy(), "the loss to be noticed")
    status, _, body = server.ask("GET", "/health")
    assert (status, "E1" in body["reason"]) == (503, True)
    fleet.start("n1", "L*:E1,5")
    wait_until(server.healthy, "the node's return")


def test_callers_are_told_that_the_service_stops(server: Server) -> None:
    asked = {"prompt": "Hello", "max_tokens": 4000, "stream": True}
    connection, response = server.open("POST", "/v1/completions", asked)
    response.readline()
    server.process.send_signal(signal.SIGTERM)
    *_, error, done, _ = response.read().split(b"\n\n")
    connection.close()
    assert b"the server was stopped" in error
    assert done == b"data: [DONE]"
    assert server.process.wait(PATIENCE_S) == 0


def test_a_signal_ends_the_wait_for_a_broker_that_is_away(
    tiny_bundle: Callable[[Scheme], Path], tmp_path: Path
) -> None:  # fmt: skip
    with open_broker("embedded") as address:
        fleet = LocalNodes(tiny_bundle("fp32"), address, tmp_path / "nodes")
        fleet.start("all", "L*:E*")
        server = Server(fleet, tmp_path)
    try:
        wait_until(lambda: "trying again for 60 s" in server.log.read_text(), "the loss to be noticed")
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 0  # about a second, and a minute when it waits for the broker
        assert "Traceback" not in server.log.read_text()
    finally:
        server.process.kill()
        fleet.stop()


def test_startup_errors_are_reported_before_the_model_is_loaded(fleet: LocalNodes, tmp_path: Path) -> None:
    argv = ("bs_coordinator", "serve", "--bundle", fleet.bundle, "--host", "192.0.2.1")
    done = run_in_process(*argv)
    assert done.returncode == 45
    assert "--api-key-file" in done.stderr
    assert os.linesep.join(done.stderr.splitlines()[:-1]) == ""
    for key in (b"", b" \n", "schlüssel".encode(), b"\xff\xfe", b"two\nlines"):
        file = tmp_path / "key"
        file.write_bytes(key)
        file.chmod(0o600)
        done = run_in_process(*argv, "--api-key-file", file)
        assert done.returncode == 51
        (line,) = done.stderr.splitlines()
        assert str(file) in line
