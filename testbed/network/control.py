"""The control socket of a running network: one request and one reply per connection, each a line of JSON.

It is a Unix socket: reachable from inside every network namespace, but only by its owner.
"""

import contextlib
import socket
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
from msgspec import Struct

from common.jsonl import decode_json
from testbed.errors import NetworkError, PrivilegeError
from testbed.network.spec import LinkSpec

MAX_REQUEST_BYTES = 4096
MAX_REPLY_BYTES = 1 << 20
_MAX_CLIENTS = 16
_CLIENT_S = 2.0


class SetProfile(Struct, frozen=True, forbid_unknown_fields=True, tag_field="do", tag="set"):
    """Request: switch to a profile, from its beginning."""

    profile: str


class Hold(Struct, frozen=True, forbid_unknown_fields=True, tag_field="do", tag="hold"):
    """Request: hold the profile at the moment `at_s`; None restarts it from its beginning."""

    at_s: float | None = None


class GetStatus(Struct, frozen=True, forbid_unknown_fields=True, tag_field="do", tag="status"):
    """Request: change nothing, only return the status."""


Request = SetProfile | Hold | GetStatus


class Counters(Struct, frozen=True):
    """Traffic of one direction of one link since the network came up.

    Attributes:
        sent_frames: frames delivered to the other end.
        sent_bytes: their bytes, with Ethernet headers.
        dropped_frames: frames dropped because the queue was full.
        lost_frames: frames lost on the air.
        waiting_frames: frames in the queue now.
        waiting_ms: time that the queued frames take at the link's rate.
    """

    sent_frames: int
    sent_bytes: int
    dropped_frames: int
    lost_frames: int
    waiting_frames: int
    waiting_ms: float


class NodeLinkStatus(Struct, frozen=True):
    """Configuration and traffic of one node's link at the moment."""

    node: str
    address: str
    link: LinkSpec
    down: Counters
    up: Counters


class NetworkStatus(Struct, frozen=True, kw_only=True):
    """State of a running network.

    Attributes:
        pid: process id of the relay.
        at_s: seconds since the profile was set, or the moment at which it is held.
        held: whether the profile is held.
        late_ms: largest delay that the relay itself added in the last second, on top of the links' delays.
        cpu_percent: share of one core that the relay took in the last second.
    """

    name: str
    pid: int
    spec_sha256: str
    profile: str
    shared_air: bool
    at_s: float
    held: bool
    late_ms: float
    cpu_percent: float
    nodes: list[NodeLinkStatus]


class Refusal(Struct, frozen=True):
    """Reply to a request that can't be fulfilled, with the reason."""

    error: str


class ControlServer:
    """The relay's end of the control socket; never blocks.

    Args:
        path: where to make the socket; must not exist.
        answer: handles a request; the client gets the message of a `ValueError`.
    """

    def __init__(self, path: Path, answer: Callable[[Request], NetworkStatus]) -> None:
        self._answer = answer
        self._clients: dict[int, tuple[socket.socket, bytearray, float]] = {}
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        self._listener.bind(str(path))
        path.chmod(0o600)
        self._listener.listen(_MAX_CLIENTS)

    def filenos(self) -> list[int]:
        """File descriptors to wait for."""
        return [self._listener.fileno(), *self._clients]

    def handle(self, fileno: int) -> None:
        """Accept, read or reply, after the descriptor `fileno` became readable."""
        if fileno == self._listener.fileno():
            self._accept()
        elif fileno in self._clients:
            client, received, _ = self._clients[fileno]
            with contextlib.suppress(BlockingIOError):
                received += self._receive(client)
                if b"\n" in received:
                    self._reply(client, bytes(received).partition(b"\n")[0])
                    self._drop(fileno)
                elif len(received) > MAX_REQUEST_BYTES or not received:
                    self._drop(fileno)

    def drop_late(self) -> None:
        """Close connections whose request did not arrive within its deadline."""
        for fileno, (_, _, deadline) in list(self._clients.items()):
            if time.monotonic() > deadline:
                self._drop(fileno)

    def _accept(self) -> None:
        with contextlib.suppress(BlockingIOError, ConnectionError):
            client, _ = self._listener.accept()
            client.setblocking(False)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MAX_REPLY_BYTES)
            if len(self._clients) >= _MAX_CLIENTS:
                client.close()
            else:
                self._clients[client.fileno()] = client, bytearray(), time.monotonic() + _CLIENT_S

    def _receive(self, client: socket.socket) -> bytes:
        try:
            return client.recv(MAX_REQUEST_BYTES + 1)
        except ConnectionError:
            return b""

    def _reply(self, client: socket.socket, line: bytes) -> None:
        reply: NetworkStatus | Refusal
        try:
            reply = self._answer(msgspec.json.decode(line, type=Request))
        except (ValueError, RecursionError) as error:
            reply = Refusal(str(error))
        # Never wait for a client that does not read: that would delay frames.
        with contextlib.suppress(OSError):
            client.send(msgspec.json.encode(reply) + b"\n")

    def _drop(self, fileno: int) -> None:
        self._clients.pop(fileno)[0].close()


def ask(path: Path, request: Request, *, timeout_s: float = 5.0) -> NetworkStatus:
    """Send a request to a running network and return its status afterwards.

    Raises:
        PrivilegeError: the network belongs to another user.
        NetworkError: the network does not answer in time, or refuses.
    """
    deadline = time.monotonic() + timeout_s
    received = bytearray()
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            client.settimeout(timeout_s)
            client.connect(str(path))
            client.sendall(msgspec.json.encode(request) + b"\n")
            while b"\n" not in received and len(received) <= MAX_REPLY_BYTES:
                client.settimeout(max(0.001, deadline - time.monotonic()))
                part = client.recv(1 << 16)
                if not part:
                    break
                received += part
    except PermissionError:
        raise PrivilegeError(f"only the owner of the emulated network may use {path}: run as root") from None
    except OSError as error:
        raise NetworkError(
            f"the emulated network does not answer on {path} ({error}): 'wdmoe-testbed net down' cleans up"
        ) from None
    return _decode(bytes(received), path)


def _decode(received: bytes, path: Path) -> NetworkStatus:
    line, end, _ = received.partition(b"\n")
    try:
        if not end:
            raise NetworkError(f"the emulated network closed {path} in the middle of its reply")
        if b'"error"' in line[:16]:
            raise NetworkError(decode_json(line, Refusal).error)
        return decode_json(line, NetworkStatus)
    except msgspec.DecodeError as error:
        raise NetworkError(f"the emulated network sent an invalid reply: {error}") from None
