"""MQTT 3.1.1 over one TCP connection, driven by its owner's thread: no thread hand-off per message.

A message costs one system call to send and two to receive, and its payload one copy. `wire.mqtt_packets` has the
protocol's bytes; this module has the socket, a deadline on everything that waits, and errors in the words of
`wire.errors`. It knows nothing of frames.
"""

import collections
import contextlib
import ctypes
import functools
import logging
import select
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from wire import mqtt_packets as packets
from wire.broker_url import BrokerAddress
from wire.errors import BrokerAuthError, BrokerError
from wire.mqtt_packets import ConnAck, Packet, PingResp, PubAck, Publish, SubAck
from wire.status import SocketFacts
from wire.tcp_info import read_socket_facts
from wire.transport import Message

log = logging.getLogger(__name__)

KEEPALIVE_S = 10
"""A peer that vanishes without closing its socket is declared dead by the broker after 1.5× this."""
_QUEUE_LIMIT = 4096
_LARGE_BYTES = 32 << 20
_REFUSALS = {
    1: "it does not speak MQTT 3.1.1",
    2: "it does not take our client id",
    3: "it is not available",
    4: "bad user name or password",
    5: "not authorized",
}
_AUTH_REFUSALS = (4, 5)
_NOT_NOW = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


@dataclass(frozen=True, slots=True)
class LastWill:
    """What the broker publishes, retained and with QoS 1, when this client disappears."""

    topic: str
    payload: bytes


class MqttTransport:
    """A connected MQTT client (`wire.transport.Transport`).

    Messages that arrive while nobody calls `receive` wait in a queue of bounded length; past it the oldest is
    dropped and counted in `dropped`, since every request above has a deadline of its own.
    """

    def __init__(
        self, address: BrokerAddress, client_id: str, *, will: LastWill | None = None, timeout_s: float = 10.0
    ) -> None:
        """Connect and wait for the broker's acknowledgement.

        Raises:
            BrokerAuthError: user or password refused, or the broker's certificate is not trusted.
            BrokerError: not reachable within `timeout_s`, or it refuses for another reason.
        """
        self.address = address
        self.dropped = 0
        self._inbox: collections.deque[Message] = collections.deque()
        self._outbox: collections.deque[memoryview] = collections.deque()
        self._reader = packets.Reader()
        self._topics: dict[str, bytes] = {}
        self._connack: ConnAck | None = None
        self._subscribed: dict[int, bool] = {}
        self._unacknowledged: set[int] = set()
        self._last_id = 0
        self._poll = select.poll()
        self._polled = 0
        keep_large_buffers()
        deadline = time.monotonic() + timeout_s
        self._socket: socket.socket | None = self._connect(timeout_s)
        self._heard_s = self._pinged_s = 0.0
        self._next_ping_s = time.monotonic() + KEEPALIVE_S / 2
        try:
            self._introduce(client_id, will, deadline)
        except BrokerError:
            self._hang_up()
            raise

    def _connect(self, timeout_s: float) -> socket.socket:
        address = self.address
        try:
            plain = socket.create_connection((address.host, address.port), timeout_s)
            try:
                # Without it the kernel holds back a small write until the last one is acknowledged: up to 40 ms.
                plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                sock = _tls(address).wrap_socket(plain, server_hostname=address.host) if address.tls else plain
                sock.setblocking(False)
            except BaseException:
                plain.close()
                raise
        except ssl.SSLError as error:
            raise BrokerAuthError(f"TLS with {address} failed: {error.reason or error}") from None
        except OSError as error:
            why = error.strerror or str(error)
            raise BrokerError(f"no broker at {address} ({why}): is it running, is the address right?") from None
        return sock

    def _introduce(self, client_id: str, will: LastWill | None, deadline: float) -> None:
        address = self.address
        try:
            self._send(
                packets.connect(
                    client_id,
                    keepalive_s=KEEPALIVE_S,
                    will=(will.topic, will.payload) if will else None,
                    user=address.user,
                    password=address.password,
                )
            )
            self._step_until(
                lambda: self._connack is not None,
                deadline,
                f"{address} accepted the connection but does not answer as an MQTT broker",
            )
        except BrokerError as error:
            if not address.tls or time.monotonic() >= deadline:
                raise
            # With TLS 1.3 a broker judges a client's certificate after the client's part of the handshake.
            alert = _alert(error.__cause__)
            why = (
                f"refused our certificate: {alert}"
                if alert
                else ("hung up: it may want a certificate (--tls-cert, --tls-key), or not accept ours any more")
            )
            raise BrokerAuthError(f"the broker at {address} {why}") from None
        code = self._connack.code if self._connack else 0
        if code in _AUTH_REFUSALS:
            raise BrokerAuthError(
                f"the broker at {address} refused user '{address.user or 'anonymous'}': check the user "
                "in the URL and --password-file"
            )
        if code:
            raise BrokerError(f"the broker at {address} refused the connection: {_REFUSALS.get(code, code)}")

    def subscribe(self, topic_filter: str, *, qos: int = 0, timeout_s: float = 10.0) -> None:
        """Subscribe and wait for the broker's confirmation.

        Raises:
            BrokerError: refused (for example by an ACL) or not confirmed within `timeout_s`.
        """
        id = self._new_id()
        self._send(packets.subscribe(id, topic_filter, qos))
        self._step_until(
            lambda: id in self._subscribed,
            time.monotonic() + timeout_s,
            f"{self.address} did not confirm the subscription to {topic_filter}",
        )
        if not self._subscribed.pop(id):
            raise BrokerError(f"the broker refused the subscription to {topic_filter}: check its ACL")

    def publish(self, topic: str, payload: bytes, *, qos: int = 0, retain: bool = False) -> None:
        """Write a message to the socket, or queue what the socket does not take at once.

        Raises:
            BrokerError: the connection is lost.
        """
        self._publish(topic, payload, self._new_id() if qos else 0, retain)

    def publish_confirmed(self, topic: str, payload: bytes, *, retain: bool, timeout_s: float = 10.0) -> None:
        """Publish with QoS 1 and wait for the broker's acknowledgement.

        Raises:
            BrokerError: the connection is lost, or no acknowledgement within `timeout_s`.
        """
        id = self._new_id()
        self._unacknowledged.add(id)
        self._publish(topic, payload, id, retain)
        self._step_until(
            lambda: id not in self._unacknowledged,
            time.monotonic() + timeout_s,
            f"{self.address} did not acknowledge a message on {topic}",
        )

    @contextlib.contextmanager
    def in_one_segment(self) -> Iterator[None]:
        """What is published meanwhile leaves together, where the kernel can hold it back (Linux)."""
        sock = self._socket
        cork = getattr(socket, "TCP_CORK", None)
        if sock is None or cork is None:
            yield
            return
        sock.setsockopt(socket.IPPROTO_TCP, cork, 1)
        try:
            yield
        finally:
            sock.setsockopt(socket.IPPROTO_TCP, cork, 0)

    def receive(self, timeout_s: float) -> Message | None:
        """The next message, or None when none came within `timeout_s`.

        Raises:
            BrokerError: the connection is lost.
        """
        if self._inbox:
            return self._inbox.popleft()
        deadline = time.monotonic() + timeout_s
        remaining = timeout_s
        while True:
            self._step(max(0.0, remaining))
            if self._inbox:
                return self._inbox.popleft()
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                return None

    def socket_facts(self) -> SocketFacts | None:
        """The kernel's account of our connection to the broker; None where there is none."""
        return read_socket_facts(self._socket) if self._socket is not None else None

    def close(self) -> None:
        """Disconnect cleanly (the last will is not sent); what is still queued gets a second to leave."""
        if self._socket is None:
            return
        with contextlib.suppress(BrokerError):
            self._send(packets.DISCONNECT)
            self._step_until(lambda: not self._outbox, time.monotonic() + 1.0, "")
        self._hang_up()

    def _hang_up(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        self._outbox.clear()

    def _new_id(self) -> int:
        self._last_id = self._last_id % 0xFFFF + 1
        return self._last_id

    def _publish(self, topic: str, payload: bytes, id: int, retain: bool) -> None:
        name = self._topics.get(topic)
        if name is None:
            name = topic.encode()
            if len(self._topics) < _QUEUE_LIMIT:
                self._topics[topic] = name
        self._send(packets.publish_head(name, len(payload), retain=retain, packet_id=id), payload)

    def _send(self, *parts: bytes) -> None:
        """A packet to the socket, or behind what already waits for it."""
        if len(self._outbox) > _QUEUE_LIMIT:
            raise BrokerError(f"more than {_QUEUE_LIMIT} messages wait for {self.address}: the link is stuck")
        if self._outbox:
            self._outbox.extend(memoryview(part) for part in parts if part)
            return
        sent = self._write(parts)
        if sent < sum(map(len, parts)):
            for part in parts:
                if sent < len(part):
                    self._outbox.append(memoryview(part)[sent:])
                sent = max(0, sent - len(part))

    def _write(self, parts: tuple[bytes | memoryview, ...]) -> int:
        """Bytes that the socket took."""
        sock = self._socket
        if sock is None:
            raise self._lost("not connected")
        try:
            # TLS has no call for several pieces, and pays for each one with a record of its own.
            count = sock.send(b"".join(parts)) if isinstance(sock, ssl.SSLSocket) else sock.sendmsg(parts)
        except _NOT_NOW:
            return 0
        except OSError as error:
            raise self._lost(_why(error)) from error
        return count

    def _flush(self) -> None:
        while self._outbox:
            part = self._outbox[0]
            count = self._write((part,))
            if count < len(part):
                self._outbox[0] = part[count:]
                return
            self._outbox.popleft()

    def _step_until(self, done: Callable[[], bool], deadline: float, what: str) -> None:
        while not done():
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise BrokerError(what)
            self._step(remaining)

    def _step(self, timeout_s: float) -> None:
        """One turn of the poll loop: wait for the socket, then read, write and keep alive."""
        sock = self._socket
        if sock is None:
            raise self._lost("not connected")
        if isinstance(sock, ssl.SSLSocket) and sock.pending():
            timeout_s = 0.0  # TLS has decrypted bytes that poll() can't see
        wanted = select.POLLIN | (select.POLLOUT if self._outbox else 0)
        if self._polled != wanted:
            self._poll.register(sock, wanted)
            self._polled = wanted
        # Wake up often enough to send keep-alives.
        found = self._poll.poll(1000 * min(timeout_s, KEEPALIVE_S / 4))
        events = found[0][1] if found else 0
        if events & ~select.POLLOUT or timeout_s == 0.0:
            self._read(sock)
        if self._outbox:
            self._flush()
        self._keep_alive()

    def _read(self, sock: socket.socket) -> None:
        try:
            count = sock.recv_into(self._reader.space())
        except _NOT_NOW:
            return
        except OSError as error:
            raise self._lost(_why(error)) from error
        if not count:
            raise self._lost("it hung up")
        arrived_ns = time.perf_counter_ns()
        self._heard_s = time.monotonic()
        try:
            for packet in self._reader.received(count):
                self._take(packet, arrived_ns)
        except ValueError as error:
            raise self._lost(f"it does not speak MQTT 3.1.1: {error}") from None

    def _take(self, packet: Packet, arrived_ns: int) -> None:
        match packet:
            case Publish(topic, payload, retained, id):
                if len(self._inbox) >= _QUEUE_LIMIT:
                    self._inbox.popleft()
                    self.dropped += 1
                self._inbox.append(Message(topic, payload, arrived_ns, retained))
                if id:
                    self._send(packets.puback(id))
            case PubAck(id):
                self._unacknowledged.discard(id)
            case SubAck(id, granted):
                self._subscribed[id] = granted
            case ConnAck():
                self._connack = packet
            case PingResp():
                pass  # that we heard anything is what counts

    def _keep_alive(self) -> None:
        """Ask for a sign of life twice in the keep-alive time; what came in before was read just now."""
        now_s = time.monotonic()
        if now_s < self._next_ping_s:
            return
        self._next_ping_s = now_s + KEEPALIVE_S / 2
        if self._heard_s >= self._pinged_s:
            self._pinged_s = now_s
            self._send(packets.PING)
        elif now_s - self._pinged_s >= KEEPALIVE_S:
            raise self._lost("it does not answer any more")

    def _lost(self, why: str) -> BrokerError:
        return BrokerError(f"lost the connection to the broker at {self.address} ({why})")


@functools.cache
def keep_large_buffers() -> None:
    """Let the C library reuse the memory of large messages, where it can (glibc).

    By default it takes every buffer above 128 KiB from the system and gives it back at once: page faults for every
    page of every message.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        m_trim_threshold, m_mmap_threshold = -1, -3
        libc.mallopt(m_mmap_threshold, _LARGE_BYTES)
        libc.mallopt(m_trim_threshold, 2 * _LARGE_BYTES)


def _tls(address: BrokerAddress) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(address.ca_file) if address.ca_file else None)
    if address.tls_cert:
        context.load_cert_chain(address.tls_cert, address.tls_key)
    return context


def _why(error: OSError) -> str:
    return error.strerror or str(error)


def _alert(error: BaseException | None) -> str:
    """What a TLS peer told us before it hung up: `SSLV3_ALERT_CERTIFICATE_REVOKED` is "certificate revoked"."""
    reason = (error.reason if isinstance(error, ssl.SSLError) else "") or ""
    _, found, alert = reason.partition("ALERT_")
    return alert.replace("_", " ").lower() if found else ""
