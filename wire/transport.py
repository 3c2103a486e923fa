"""The one seam between our code and the network: publish, subscribe, receive.

`wire.mqtt.MqttTransport` is the real one. Tests of anything above it can bring their own in a few lines.
"""

from typing import NamedTuple, Protocol


class Message(NamedTuple):
    """A message that arrived.

    Attributes:
        arrived_ns: `time.perf_counter_ns()` when it was read off the socket.
        retained: it was stored by the broker and is not fresh.
    """

    topic: str
    payload: bytes
    arrived_ns: int
    retained: bool = False


class Transport(Protocol):
    """Publish and receive, from one thread, with a deadline on everything that waits."""

    def subscribe(self, topic_filter: str, *, qos: int = 0) -> None:
        """Ask for messages, and return once the broker has confirmed."""

    def publish(self, topic: str, payload: bytes, *, qos: int = 0, retain: bool = False) -> None:
        """Hand a message to the network; with `qos` 1, `receive` drives its confirmation."""

    def receive(self, timeout_s: float) -> Message | None:
        """The next message, or None when none came within `timeout_s`."""

    def close(self) -> None:
        """Leave; idempotent."""
