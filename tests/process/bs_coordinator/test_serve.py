"""The HTTP interface as a real process on real nodes: answers, streams, too many requests, callers that leave."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Any

import psutil
import pytest

from bs_coordinator.broker.processes import free_port
from testbed.local_nodes import LocalNodes
from tests.conftest import Run

LIVE, WAITING = 8, 8
KEY = "open sesame"


class Server:
    """A running `wdmoe-bs serve`."""

    def __init__(self, fleet: LocalNodes, folder: Path) -> None:
        self.port = free_port()
        key = folder / "key"
        key.write_text(KEY)
        key.chmod(0o600)
        self.log = folder / "serve.log"
        argv = [
            sys.executable, "-m", "bs_coordinator", "serve", "--bundle", fleet.bundle, "--broker", fleet.address,
            "--cluster", fleet.cluster, "--port", self.port, "--max-live", LIVE, "--max-waiting", WAITING,
            "--api-key-file", key, "--layer-timeout", 4,
        ]  # fmt: skip
        with self.log.open("wb") as log:
            self.process = subprocess.Popen([str(a) for a in argv], stdin=subprocess.DEVNULL, stderr=log)
        deadline = time.monotonic() + 60
        while True:
            try:
                status, _, _ = self.ask("GET", "/health")
            except OSError:
                status = 0
            if status == 200:
                return
            assert time.monotonic() < deadline
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.2)

    def open(self, method: str, path: str, body: Any = None, key: str = KEY) -> tuple[HTTPConnection, HTTPResponse]:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=120)
        raw = body if isinstance(body, bytes) else json.dumps(body).encode() if body is not None else None
        connection.request(method, path, raw, {"Authorization": f"Bearer {key}"})
        return connection, connection.getresponse()

    def ask(self, method: str, path: str, body: Any = None, key: str = KEY) -> tuple[int, dict[str, str], Any]:
        connection, response = self.open(method, path, body, key)
        try:
            return response.status, dict(response.getheaders()), json.loads(response.read())
        finally:
            connection.close()


@pytest.fixture
def server(fleet: LocalNodes, tmp_path: Path) -> Iterator[Server]:
    for k in range(4):
        fleet.start(f"n{k}", f"L*:E{k},{k + 4}")
    server = Server(fleet, tmp_path)
    yield server
    server.process.send_signal(signal.SIGTERM)
    try:
        server.process.wait(30)
    finally:
        server.process.kill()
    assert "Traceback" not in server.log.read_text()


def _completion(prompt: str, tokens: int = 12, **more: object) -> dict[str, object]:
    return {"prompt": prompt, "max_tokens": tokens, **more}


def test_answers_are_those_of_the_command_line(server: Server, fleet: LocalNodes, run: Run) -> None:
    common = ["--broker", fleet.address, "--cluster", fleet.cluster, "--max-tokens", 12]
    plain = run("bs_coordinator", "generate", "--bundle", fleet.bundle, *common, "--prompt", "Hello", "--raw")
    status, _, body = server.ask("POST", "/v1/completions", _completion("Hello"))
    assert status == 200
    assert body["choices"][0]["text"] == plain.stdout.rstrip("\n")
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["usage"]["completion_tokens"] == 12
    messages = [{"role": "user", "content": "Hello"}]
    chatted = run("bs_coordinator", "generate", "--bundle", fleet.bundle, *common, "--prompt", "Hello")
    status, _, body = server.ask("POST", "/v1/chat/completions", {"messages": messages, "max_tokens": 12})
    assert status == 200
    assert body["choices"][0]["message"]["content"] == chatted.stdout.rstrip("\n")
    connection, response = server.open(
        "POST",
        "/v1/chat/completions",
        {"messages": messages, "max_tokens": 12, "stream": True, "stream_options": {"include_usage": True}},
    )
    lines = [line.removeprefix("data: ") for line in response.read().decode().split("\n\n") if line]
    connection.close()
    assert lines[-1] == "[DONE]"
    *pieces, account = (json.loads(line) for line in lines[:-1])
    assert "".join(p["choices"][0]["delta"]["content"] for p in pieces) == chatted.stdout.rstrip("\n")
    assert account["usage"] == body["usage"]
    sampled = [
        server.ask("POST", "/v1/completions", _completion("Hello", temperature=1.5, seed=seed))[2]["choices"][0]["text"]
        for seed in (None, None, 5, 5, -5)
    ]
    assert len(set(sampled)) == 4
    assert sampled[2] == sampled[3]
    (listed,) = server.ask("GET", "/v1/models")[2]["data"]
    assert server.ask("GET", f"/v1/models/{listed['id']}")[2] == listed
    assert server.ask("GET", "/v1/models/another")[0] == 404


def test_bad_requests_are_told_why(server: Server) -> None:
    post = "POST", "/v1/completions"
    for code, word, asked in [
        (400, "prompt", server.ask(*post, {})),
        (400, "max_tokens", server.ask(*post, _completion("x", 0))),
        (400, "stop", server.ask(*post, _completion("x", stop=""))),
        (400, "seed", server.ask(*post, _completion("x", seed=2**63))),
        (400, "not a request", server.ask(*post, b"\xff{")),
        (400, "context", server.ask(*post, _completion("word " * 9000))),
        (400, "context", server.ask(*post, _completion("word " * 9000, stream=True))),
        (413, "longer", server.ask(*post, b" " * (2 << 20))),
        (401, "API key", server.ask(*post, _completion("x"), key="guess")),
    ]:
        status, _, body = asked
        assert status == code, body
        assert word in body["error"]["message"]


def test_more_than_can_be_served_wait_or_are_told_to_retry(server: Server) -> None:
    """Of 32 callers 8 are served together, 8 wait, 16 are refused at once and come back until they are served."""
    alone = server.ask("POST", "/v1/completions", _completion("Once upon a time", 24))[2]["choices"][0]["text"]
    memory = psutil.Process(server.process.pid).memory_info().rss
    statuses: Counter[int] = Counter()
    texts: list[str] = []
    hints: list[float] = []
    lock = threading.Lock()

    def call() -> None:
        deadline = time.monotonic() + 200
        while time.monotonic() < deadline:
            began = time.monotonic()
            status, headers, body = server.ask("POST", "/v1/completions", _completion("Once upon a time", 24))
            with lock:
                statuses[status] += 1
                if status == 200:
                    texts.append(body["choices"][0]["text"])
                    return
                assert status == 429, body
                assert "retry after" in body["error"]["message"]
                assert time.monotonic() - began < 5
                hints.append(float({k.lower(): v for k, v in headers.items()}["retry-after"]))
            time.sleep(min(2.0, hints[-1]))

    callers = [threading.Thread(target=call) for _ in range(32)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(240)
    assert texts == [alone] * 32
    assert statuses[200] == 32
    assert statuses[429] >= 32 - LIVE - WAITING
    assert all(hint >= 1 for hint in hints)
    assert psutil.Process(server.process.pid).memory_info().rss - memory < 200 << 20
    assert server.ask("GET", "/health")[2]["requests"] == 0


def test_who_hangs_up_frees_the_place(server: Server) -> None:
    def until_requests_are(number: int, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while server.ask("GET", "/health")[2]["requests"] != number:
            assert time.monotonic() < deadline
            time.sleep(0.2)

    for stream in (True, False):
        callers = [HTTPConnection("127.0.0.1", server.port) for _ in range(LIVE + WAITING)]
        asked = json.dumps(_completion("Hello", 4000, stream=stream))
        for caller in callers:
            caller.request("POST", "/v1/completions", asked, {"Authorization": f"Bearer {KEY}"})
        until_requests_are(len(callers), 30)
        if stream:
            callers[0].getresponse().read(10)
        for caller in callers:
            caller.close()
        until_requests_are(0, 10)
    assert server.ask("POST", "/v1/completions", _completion("Hello", 2))[0] == 200


def test_health_is_not_well_while_experts_are_lost(server: Server, fleet: LocalNodes) -> None:
    assert server.ask("GET", "/health")[0] == 200
    fleet.processes["n1"].terminate()
    fleet.processes["n1"].wait(20)
    deadline = time.monotonic() + 30
    while (answer := server.ask("GET", "/health"))[0] == 200:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert answer[0] == 503
    assert "E1" in answer[2]["reason"]
    fleet.start("n1", "L*:E1,5")
    while server.ask("GET", "/health")[0] != 200:
        assert time.monotonic() < deadline + 30
        time.sleep(0.2)


def test_a_service_that_is_stopped_says_so_to_who_is_listening(server: Server) -> None:
    connection, response = server.open("POST", "/v1/completions", _completion("Hello", 4000, stream=True))
    response.readline()
    server.process.send_signal(signal.SIGTERM)
    *_, error, done, _ = response.read().split(b"\n\n")
    connection.close()
    assert b"the server was stopped" in error
    assert done == b"data: [DONE]"
    assert server.process.wait(30) == 0


def test_what_can_not_be_served_is_said_at_once(run: Run, fleet: LocalNodes, tmp_path: Path) -> None:
    argv = ("bs_coordinator", "serve", "--bundle", fleet.bundle, "--host", "192.0.2.1")
    done = run(*argv)
    assert done.returncode == 45
    assert "--api-key-file" in done.stderr
    assert os.linesep.join(done.stderr.splitlines()[:-1]) == ""
    for key in (b"", b" \n", "schlüssel".encode(), b"\xff\xfe", b"two\nlines"):
        file = tmp_path / "key"
        file.write_bytes(key)
        file.chmod(0o600)
        done = run(*argv, "--api-key-file", file)
        assert done.returncode == 51
        (line,) = done.stderr.splitlines()
        assert str(file) in line
