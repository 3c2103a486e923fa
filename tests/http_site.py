"""The HTTP interface of a base station on a real socket, in the process of the tests."""

import json
import socket
import threading
from collections.abc import Mapping
from http.client import HTTPConnection, HTTPResponse
from typing import Any

import uvicorn
from starlette.applications import Starlette

from bs_coordinator.broker.processes import free_port
from tests.waiting import PATIENCE_S, wait_until


class Caller:
    """A client of the HTTP interface.

    Attributes:
        port: of loopback.
        key: API key to send.
    """

    def __init__(self, port: int, key: str = "") -> None:
        self.port = port
        self.key = key

    def open(
        self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None
    ) -> tuple[HTTPConnection, HTTPResponse]:
        """Send a request; the response's body is left to read, and the connection to close."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S)
        raw = body if isinstance(body, bytes) else json.dumps(body).encode() if body is not None else None
        own = {"Authorization": f"Bearer {self.key}", "Content-Type": "application/json"}
        connection.request(method, path, raw, {**own, **(headers or {})})
        return connection, connection.getresponse()

    def text(
        self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None
    ) -> tuple[int, dict[str, str], str]:
        """Status, headers by their names in lower case, and body of a response."""
        connection, response = self.open(method, path, body, headers)
        try:
            received = {name.lower(): value for name, value in response.getheaders()}
            return response.status, received, response.read().decode()
        finally:
            connection.close()

    def ask(
        self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None
    ) -> tuple[int, dict[str, str], Any]:
        """The same with the body's JSON decoded."""
        status, received, text = self.text(method, path, body, headers)
        return status, received, json.loads(text)

    def send(self, path: str, body: Any) -> socket.socket:
        """Post a request and return its socket, from which nothing was read yet."""
        sock = socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE_S)
        raw = json.dumps(body).encode()
        head = (
            f"POST {path} HTTP/1.1\r\nHost: h\r\nAuthorization: Bearer {self.key}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(raw)}\r\n\r\n"
        )
        sock.sendall(head.encode() + raw)
        return sock


class HttpSite(Caller):
    """An application that listens on a port of its own until it is closed."""

    def __init__(self, app: Starlette, key: str = "") -> None:
        super().__init__(free_port(), key)
        config = uvicorn.Config(app, port=self.port, log_config=None, ws="none", timeout_graceful_shutdown=1)
        self._http = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._http.run)
        self._thread.start()
        wait_until(lambda: self._http.started or not self._thread.is_alive(), "the HTTP interface to listen")
        assert self._http.started

    def close(self) -> None:
        """Stop listening."""
        self._http.should_exit = True
        self._thread.join()
