"""A broker and its clients within one process: no sockets, and with a manual clock no waiting.

It has what this project uses of MQTT: topic filters, retained messages, last wills, and one connection per client id.
QoS means nothing here, since nothing is lost.
"""

import heapq
import itertools
import math
import threading
from collections.abc import Callable
from typing import NamedTuple

from paho.mqtt.client import topic_matches_sub

from common.clock import SYSTEM_CLOCK, Clock
from wire.broker_address import BrokerAddress
from wire.errors import BrokerError
from wire.transport import LastWill, Message, Scheme, Transport

Handler = Callable[[str, bytes], None]

_numbers = itertools.count(1)
_open_brokers: dict[str, "MemoryBroker"] = {}


class MemoryBroker:
    """A broker that clients of this process reach as `memory://<name>` while it is open as a context manager.

    Clients may live in several threads, unless the clock is a manual one.

    Attributes:
        address: for `wire.transports.connect`.
        latency_s: time from publishing a message to its arrival.
    """

    def __init__(self, *, clock: Clock = SYSTEM_CLOCK, latency_s: float = 0.0) -> None:
        """Make a broker without clients.

        Args:
            clock: what arrival times are read from. A `common.clock.ManualClock` is advanced by clients that wait, so
                that waiting takes no time; all code under test must then read the same clock.
        """
        self.address = BrokerAddress(f"broker-{next(_numbers)}", 0, scheme="memory", in_process=True)
        self.latency_s = latency_s
        self.clock = clock
        self.changed = threading.Condition()
        self._clients: dict[str, MemoryTransport] = {}
        self._retained: dict[str, bytes] = {}
        self._handlers: list[tuple[str, Handler]] = []
        self._order = itertools.count()

    def __enter__(self) -> "MemoryBroker":
        _open_brokers[self.address.host] = self
        return self

    def __exit__(self, *exc: object) -> None:
        """Stop: clients that are still connected lose their connection."""
        del _open_brokers[self.address.host]
        for client_id in list(self._clients):
            self.cut(client_id)

    def connect(
        self, address: BrokerAddress, client_id: str, *, will: LastWill | None = None, timeout_s: float = 10.0
    ) -> "MemoryTransport":
        """A new client (`wire.transport.Connect`). An earlier one with the same id loses its connection."""
        self.cut(client_id)
        client = self._clients[client_id] = MemoryTransport(self, client_id, will)
        return client

    def cut(self, client_id: str) -> None:
        """Break a client's connection, as a failing network would; its last will is published."""
        with self.changed:
            client = self._clients.pop(client_id, None)
            if client is None:
                return
            client.connected = False
            self.changed.notify_all()
        if client.will is not None:
            self.publish(client.will.topic, client.will.payload, retain=True)

    def handle(self, topic_filter: str, handler: Handler) -> None:
        """Call `handler` with topic and payload of each message that a client publishes, before it is delivered.

        It runs in the publisher's thread and may publish messages itself. What it raises, the publisher raises.
        """
        self._handlers.append((topic_filter, handler))

    def publish(self, topic: str, payload: bytes, *, retain: bool = False, delay_s: float | None = None) -> None:
        """Deliver a message to all subscribers.

        Args:
            retain: keep it for later subscribers; an empty payload removes what was kept.
            delay_s: time until it arrives, `latency_s` if None.
        """
        with self.changed:
            if retain and payload:
                self._retained[topic] = payload
            elif retain:
                self._retained.pop(topic, None)
            for client in self._clients.values():
                if any(topic_matches_sub(topic_filter, topic) for topic_filter in client.filters):
                    self._deliver(client, topic, payload, retained=False, delay_s=delay_s)
            self.changed.notify_all()

    def take(self, topic: str, payload: bytes, *, retain: bool) -> None:
        """Take a message from a client: call the handlers, then deliver it."""
        for topic_filter, handler in tuple(self._handlers):
            if topic_matches_sub(topic_filter, topic):
                handler(topic, payload)
        self.publish(topic, payload, retain=retain)

    def subscribe(self, client: "MemoryTransport", topic_filter: str) -> None:
        """Add a client's subscription, and deliver the retained messages that match it."""
        with self.changed:
            client.filters.append(topic_filter)
            for topic, payload in self._retained.items():
                if topic_matches_sub(topic_filter, topic):
                    self._deliver(client, topic, payload, retained=True)

    def forget(self, client: "MemoryTransport") -> None:
        """Forget a client that disconnected cleanly."""
        with self.changed:
            if self._clients.get(client.client_id) is client:
                del self._clients[client.client_id]

    def _deliver(
        self, client: "MemoryTransport", topic: str, payload: bytes, *, retained: bool, delay_s: float | None = None
    ) -> None:
        delay_ns = round(1e9 * (self.latency_s if delay_s is None else delay_s))
        arrival = _Arrival(self.clock.perf_ns() + delay_ns, next(self._order), topic, payload, retained)
        heapq.heappush(client.inbox, arrival)


class _Arrival(NamedTuple):
    """A message on its way to a client; sorted by the time of its arrival, then in the order of publication."""

    due_ns: int
    number: int
    topic: str
    payload: bytes
    retained: bool


class MemoryTransport(Transport):
    """A client of a `MemoryBroker`.

    Attributes:
        connected: False from the moment at which the connection was cut or closed.
        filters: what it subscribed to.
        inbox: messages on their way, a heap.
    """

    def __init__(self, broker: MemoryBroker, client_id: str, will: LastWill | None) -> None:
        self.client_id = client_id
        self.will = will
        self.connected = True
        self.filters: list[str] = []
        self.inbox: list[_Arrival] = []
        self._broker = broker

    def subscribe(self, topic_filter: str, *, qos: int = 0, timeout_s: float = 10.0) -> None:
        """Subscribe; retained messages arrive as from any other broker."""
        self._check()
        self._broker.subscribe(self, topic_filter)

    def publish(self, topic: str, payload: bytes, *, qos: int = 0, retain: bool = False) -> None:
        """Publish; the message is with the broker when this returns."""
        self._check()
        self._broker.take(topic, bytes(payload), retain=retain)

    def publish_confirmed(self, topic: str, payload: bytes, *, retain: bool, timeout_s: float = 10.0) -> None:
        """Publish; confirmed when this returns."""
        self.publish(topic, payload, qos=1, retain=retain)

    def receive(self, timeout_s: float) -> Message | None:
        """The next message that has arrived, or None if none arrives within `timeout_s` by the broker's clock."""
        clock, changed = self._broker.clock, self._broker.changed
        # Rounded up: a caller that waits for the last fraction of a nanosecond must see its own deadline pass.
        deadline_ns = clock.perf_ns() + math.ceil(1e9 * timeout_s)
        with changed:
            while True:
                self._check()
                now_ns = clock.perf_ns()
                next_ns = self.inbox[0].due_ns if self.inbox else deadline_ns
                if self.inbox and next_ns <= now_ns:
                    arrival = heapq.heappop(self.inbox)
                    return Message(arrival.topic, arrival.payload, now_ns, arrival.retained)
                if now_ns >= deadline_ns:
                    return None
                clock.wait(changed, (min(next_ns, deadline_ns) - now_ns) / 1e9)

    def close(self) -> None:
        """Disconnect cleanly: the last will is not published. A second call has no effect."""
        self.connected = False
        self._broker.forget(self)

    def _check(self) -> None:
        if not self.connected:
            raise BrokerError(f"lost the connection to the broker at {self._broker.address}")


def _connect(
    address: BrokerAddress, client_id: str, *, will: LastWill | None = None, timeout_s: float = 10.0
) -> MemoryTransport:
    broker = _open_brokers.get(address.host)
    if broker is None:
        raise BrokerError(f"no broker at {address}: it must be open in this process, use mqtt:// to reach another one")
    return broker.connect(address, client_id, will=will, timeout_s=timeout_s)


SCHEMES = (Scheme("memory", _connect, default_port=None, in_process=True),)
