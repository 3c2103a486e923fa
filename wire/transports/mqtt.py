"""MQTT 3.1.1 over one TCP connection, driven by its owner's thread: no thread hand-off per message.

paho-mqtt implements the protocol. This module adds what a latency-bound application needs: TCP_NODELAY, a deadline on
everything that waits, and the errors of `wire.errors`.
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
from collections.abc import Iterator
from typing import Any

from paho.mqtt.client import Client, MQTTMessage, MQTTv311
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode
from paho.mqtt.reasoncodes import ReasonCode

from common.tcp_info import read_tcp_info
from wire.broker_address import BrokerAddress
from wire.errors import BrokerAuthError, BrokerError
from wire.mqtt_client import ShortcutClient
from wire.status import SocketFacts
from wire.tls_errors import alert_in, handshake_error, refused_by_alert
from wire.transport import WILL_DELAY_S, LastWill, Message, Scheme, Transport

log = logging.getLogger(__name__)

_KEEPALIVE_S = round(WILL_DELAY_S / 1.5)
"""A broker gives up a client that was silent for 1.5 times this (MQTT 3.1.1, 3.1.2.10)."""
_AUTH_REFUSALS = ("Bad user name or password", "Not authorized")
_ALERT_S = 2.0
_QUEUE_LIMIT = 4096
_MISC_S = _KEEPALIVE_S / 20
"""How often keep-alives are checked; to do so for every message would cost more than the poll itself."""
_LARGE_BYTES = 32 << 20


class MqttTransport(Transport):
    """A connected MQTT client.

    Messages that arrive between two calls of `receive` wait in a queue of bounded length. When it is full, the oldest
    is dropped: every request of this project has a deadline of its own.

    Attributes:
        address: of the broker.
        dropped: messages that were dropped because the queue was full, or because their topic was not valid UTF-8.
    """

    def __init__(
        self, address: BrokerAddress, client_id: str, *, will: LastWill | None = None, timeout_s: float = 10.0
    ) -> None:
        """Connect and wait for the broker's acknowledgement (`wire.transport.Connect`)."""
        self.address = address
        self.dropped = 0
        self._inbox: collections.deque[Message] = collections.deque()
        self._connack: ReasonCode | None = None
        self._alert = ""
        self._subscribed: dict[int, bool] = {}
        self._poll = select.poll()
        self._polled: tuple[Any, int] | None = None
        self._next_misc_s = 0.0
        keep_large_buffers()
        self._client = client = ShortcutClient(
            CallbackAPIVersion.VERSION2, client_id=client_id, protocol=MQTTv311, reconnect_on_failure=False,
            deliver=self._on_short_message,
        )  # fmt: skip
        client.connect_timeout = timeout_s
        client.max_inflight_messages_set(1000)
        client.max_queued_messages_set(_QUEUE_LIMIT)
        client.on_message = self._on_message
        client.on_connect = self._on_connect
        client.on_subscribe = self._on_subscribe
        client.on_socket_open = _disable_nagle
        if address.user:
            client.username_pw_set(address.user, address.password)
        if will:
            client.will_set(will.topic, will.payload, qos=1, retain=True)
        try:
            self._connect(timeout_s)
        except BrokerError:
            self.close()
            raise

    def _connect(self, timeout_s: float) -> None:
        address = self.address
        if address.tls:
            self._prepare_tls()
        try:
            self._client.connect(address.host, address.port, keepalive=_KEEPALIVE_S)
        except ssl.SSLError as error:
            raise handshake_error(error, address) from None
        except OSError as error:
            why = error.strerror or str(error)
            raise BrokerError(f"no broker at {address} ({why}): is it running, is the address right?") from None
        deadline = time.monotonic() + timeout_s
        while self._connack is None:
            try:
                self._step_until(deadline, f"{address} accepted the connection but does not answer as an MQTT broker")
            except BrokerError:
                if not address.tls or time.monotonic() >= deadline:
                    raise
                # With TLS 1.3 a broker checks a client's certificate after the client's part of the handshake.
                self._alert = self._alert or self._read_alert()
                if self._alert:
                    raise refused_by_alert(self._alert, address) from None
                # A broker that restarts, or a forwarder without one behind it, hangs up as well: only an alert refuses.
                hint = "" if address.tls_cert else ", or does it want a certificate (--tls-cert, --tls-key)"
                raise BrokerError(f"the broker at {address} hung up: is it starting{hint}?") from None
        if self._connack.is_failure:
            reason = str(self._connack)
            self._client.disconnect()
            if reason in _AUTH_REFUSALS:
                raise BrokerAuthError(
                    f"the broker at {address} refused user '{address.user or 'anonymous'}': check the user "
                    "in the URL and --password-file"
                )
            raise BrokerError(f"the broker at {address} refused the connection: {reason}")

    def _prepare_tls(self) -> None:
        address = self.address
        ca_file = str(address.ca_file) if address.ca_file else None
        certificate, key = (str(p) if p else None for p in (address.tls_cert, address.tls_key))
        self._tls = context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        try:
            if certificate:
                # An empty password: OpenSSL would ask for that of an encrypted key on the terminal.
                context.load_cert_chain(certificate, key, password="")
            if ca_file:
                context.load_verify_locations(ca_file)
            else:
                context.load_default_certs()
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
            files = ", ".join(str(p) for p in (address.ca_file, address.tls_cert, address.tls_key) if p)
            why = getattr(error, "reason", None) or getattr(error, "strerror", None) or str(error)
            raise BrokerAuthError(
                f"TLS with {address} can't be prepared: {why}: --ca-file and --tls-cert need certificates in PEM, "
                f"--tls-key the unencrypted key of --tls-cert; given: {files or 'none'}",
                final=False,  # while the files are being replaced, certificate and key may not fit together
            ) from None
        self._client.tls_set_context(context)
        self._client.on_log = self._on_log

    def _read_alert(self) -> str:
        """The alert with which the broker refuses us; empty if it does not.

        It is lost when the broker hangs up before it has read the first message: here we send none.
        """
        address = (self.address.host, self.address.port)
        try:
            with (
                socket.create_connection(address, _ALERT_S) as raw,
                self._tls.wrap_socket(raw, server_hostname=self.address.host) as secured,
            ):
                secured.recv(1)
        except OSError as error:
            return alert_in(str(error))
        return ""

    def subscribe(self, topic_filter: str, *, qos: int = 0, timeout_s: float = 10.0) -> None:
        """Subscribe and wait for the broker's confirmation."""
        rc, mid = self._client.subscribe(topic_filter, qos)
        self._check(rc)
        assert mid is not None  # noqa: S101 - paho returns an id with every success
        deadline = time.monotonic() + timeout_s
        while mid not in self._subscribed:
            self._step_until(deadline, f"{self.address} did not confirm the subscription to {topic_filter}")
        if not self._subscribed.pop(mid):
            raise BrokerError(f"the broker refused the subscription to {topic_filter}: check its ACL")

    def publish(self, topic: str, payload: bytes, *, qos: int = 0, retain: bool = False) -> None:
        """Write a message to the socket, or queue what the socket does not take at once."""
        if qos or retain:
            self._check(self._client.publish(topic, payload, qos, retain).rc)
        else:
            self._check(self._client.send(topic, payload))

    def publish_confirmed(self, topic: str, payload: bytes, *, retain: bool, timeout_s: float = 10.0) -> None:
        """Publish with QoS 1 and wait for the broker's acknowledgement."""
        info = self._client.publish(topic, payload, 1, retain)
        self._check(info.rc)
        deadline = time.monotonic() + timeout_s
        while not info.is_published():
            self._step_until(deadline, f"{self.address} did not acknowledge a message on {topic}")

    @contextlib.contextmanager
    def in_one_segment(self) -> Iterator[None]:
        """Hold back what is published within the context, where the kernel can (Linux: TCP_CORK)."""
        sock: Any = self._client.socket()
        cork = getattr(socket, "TCP_CORK", None)
        if sock is None or cork is None:
            yield
            return
        sock.setsockopt(socket.IPPROTO_TCP, cork, 1)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # the connection was lost, and paho has closed the socket
                sock.setsockopt(socket.IPPROTO_TCP, cork, 0)

    def receive(self, timeout_s: float) -> Message | None:
        """The next message, or None if none arrives within `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while not self._inbox:
            remaining = deadline - time.monotonic()
            self._step(max(0.0, remaining))
            if remaining <= 0:
                break
        return self._inbox.popleft() if self._inbox else None

    def socket_facts(self) -> SocketFacts | None:
        """The kernel's statistics of the connection to the broker; None if it keeps none."""
        sock: Any = self._client.socket()
        info = read_tcp_info(sock) if sock is not None else None
        if info is None:
            return None
        with contextlib.suppress(OSError):  # closed meanwhile
            host, port = sock.getsockname()[:2]
            return SocketFacts(endpoint=f"{host}:{port}", **info._asdict())
        return None

    def close(self) -> None:
        """Disconnect cleanly, after at most a second for what is still queued. The last will is not published."""
        with contextlib.suppress(BrokerError):
            deadline = time.monotonic() + 1.0
            while self._client.want_write() and time.monotonic() < deadline:
                self._step(0.05)
        self._client.disconnect()

    def _step_until(self, deadline: float, what: str) -> None:
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            raise BrokerError(what)
        self._step(remaining)

    def _step(self, timeout_s: float) -> None:
        """One turn of the poll loop: wait for the socket, then read, write and keep alive."""
        client = self._client
        sock: Any = client.socket()
        if sock is None:
            raise self._lost(MQTTErrorCode.MQTT_ERR_NO_CONN)
        if getattr(sock, "pending", int)():
            timeout_s = 0.0  # TLS has decrypted bytes that poll() does not know of
        # Wake up often enough to send keep-alives.
        timeout_s = min(timeout_s, _KEEPALIVE_S / 4)
        wanted = select.POLLIN | (select.POLLOUT if client.want_write() else 0)
        if self._polled != (sock, wanted):
            self._poll.register(sock, wanted)
            self._polled = (sock, wanted)
        found = self._poll.poll(timeout_s * 1000)
        events = found[0][1] if found else 0
        if events & ~select.POLLOUT or getattr(sock, "pending", int)():
            self._check(client.read())
        if events & select.POLLOUT:
            self._check(client.loop_write())
        now_s = time.monotonic()
        if now_s >= self._next_misc_s:
            self._next_misc_s = now_s + _MISC_S
            self._check(client.loop_misc())

    def _check(self, rc: MQTTErrorCode) -> None:
        if rc == MQTTErrorCode.MQTT_ERR_QUEUE_SIZE:
            raise BrokerError(f"more than {_QUEUE_LIMIT} messages wait for {self.address}: the link is stuck")
        if rc != MQTTErrorCode.MQTT_ERR_SUCCESS and (self._connack is None or not self._connack.is_failure):
            raise self._lost(rc)

    def _lost(self, rc: MQTTErrorCode) -> BrokerError:
        return BrokerError(f"lost the connection to the broker at {self.address} ({rc.name})")

    def _on_log(self, client: Client, userdata: Any, level: int, text: str) -> None:
        # paho reports why a connection ended only here: "… [SSL: SSLV3_ALERT_CERTIFICATE_REVOKED] sslv3 alert …"
        self._alert = alert_in(text) or self._alert

    def _on_connect(self, client: Client, userdata: Any, flags: Any, reason: ReasonCode, props: Any) -> None:
        self._connack = reason

    def _on_subscribe(self, client: Client, userdata: Any, mid: int, reasons: list[ReasonCode], props: Any) -> None:
        self._subscribed[mid] = not any(r.is_failure for r in reasons)

    def _on_message(self, client: Client, userdata: Any, message: MQTTMessage) -> None:
        try:
            topic = message.topic
        except UnicodeDecodeError:
            self.dropped += 1
            return
        self._put(topic, bytes(message.payload), retained=bool(message.retain))

    def _on_short_message(self, topic: bytes, payload: bytes) -> None:
        try:
            self._put(topic.decode(), payload)
        except UnicodeDecodeError:
            self.dropped += 1

    def _put(self, topic: str, payload: bytes, *, retained: bool = False) -> None:
        if len(self._inbox) >= _QUEUE_LIMIT:
            self._inbox.popleft()
            self.dropped += 1
        self._inbox.append(Message(topic, payload, time.perf_counter_ns(), retained))


@functools.cache
def keep_large_buffers() -> None:
    """Make the C library keep and reuse the memory of large messages, where it can (glibc).

    By default glibc takes every buffer above 128 KiB from the system and returns it at once, which costs a page fault
    for every page of every message.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        m_trim_threshold, m_mmap_threshold = -1, -3
        libc.mallopt(m_mmap_threshold, _LARGE_BYTES)
        libc.mallopt(m_trim_threshold, 2 * _LARGE_BYTES)


def _disable_nagle(client: Client, userdata: Any, sock: Any) -> None:
    # Nagle's algorithm holds back a small write until the last one is acknowledged: up to 40 ms.
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


SCHEMES = (
    Scheme("mqtt", MqttTransport, default_port=1883),
    Scheme("mqtts", MqttTransport, default_port=8883, tls=True),
)
