"""The seam between this project and the network: what a base station and a node use of a broker.

`wire.transports` finds the implementation that belongs to an address. Code above takes a `Transport`, or a `Connect`
that makes one, and knows no implementation.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, NamedTuple, Protocol

from wire.broker_address import BrokerAddress

if TYPE_CHECKING:
    from wire.status import SocketFacts

WILL_DELAY_S = 15.0
"""A client that vanishes without closing its connection is given up, and its last will published, within this time."""


class Message(NamedTuple):
    """A message that arrived.

    Attributes:
        arrived_ns: when it was read off the connection, by `common.clock.Clock.perf_ns`.
        retained: the broker had stored it; it may be old.
    """

    topic: str
    payload: bytes
    arrived_ns: int
    retained: bool = False


class LastWill(NamedTuple):
    """What the broker publishes, retained and with QoS 1, when a client disappears without `Transport.close`."""

    topic: str
    payload: bytes


class Transport(Protocol):
    """A client's connection to a broker: publish and receive, from one thread, with a deadline on all that waits.

    An implementation that inherits from this class gets the defaults of `in_one_segment` and `socket_facts`.
    """

    def subscribe(self, topic_filter: str, *, qos: int = 0, timeout_s: float = 10.0) -> None:
        """Subscribe and wait for the broker's confirmation.

        Raises:
            BrokerError: refused (for example by an access list), or not confirmed within `timeout_s`.
        """

    def publish(self, topic: str, payload: bytes, *, qos: int = 0, retain: bool = False) -> None:
        """Hand a message to the network; with `qos` 1, later calls of `receive` drive its confirmation.

        Raises:
            BrokerError: the connection is lost.
        """

    def publish_confirmed(self, topic: str, payload: bytes, *, retain: bool, timeout_s: float = 10.0) -> None:
        """Publish with QoS 1 and wait for the broker's acknowledgement.

        Raises:
            BrokerError: the connection is lost, or there is no acknowledgement within `timeout_s`.
        """

    def in_one_segment(self) -> AbstractContextManager[None]:
        """Send what is published within the context together, where the operating system can hold it back."""
        return nullcontext()

    def receive(self, timeout_s: float) -> Message | None:
        """The next message, or None if none arrives within `timeout_s`.

        Raises:
            BrokerError: the connection is lost.
        """

    def socket_facts(self) -> "SocketFacts | None":
        """The kernel's statistics of the connection; None if there is no socket or the kernel keeps none."""
        return None

    def close(self) -> None:
        """Disconnect cleanly: the last will is not published. A second call has no effect."""


class Connect(Protocol):
    """Opens a connection to a broker, such as `wire.transports.connect`."""

    def __call__(
        self, address: BrokerAddress, client_id: str, *, will: LastWill | None = None, timeout_s: float = 10.0
    ) -> Transport:
        """Connect and wait for the broker's acknowledgement.

        Raises:
            BrokerAuthError: user, password or certificate is refused, or the broker's certificate is not trusted.
            BrokerError: not reachable within `timeout_s`, or refused for another reason.
        """


class Scheme(NamedTuple):
    """One way to reach a broker, as the scheme of its URL names it.

    Attributes:
        name: the part of a URL before `://`.
        default_port: of a URL without one; None if addresses have no ports.
        tls: connections are encrypted, and certificates are checked.
        in_process: nothing leaves this process, so there is nothing to encrypt.
    """

    name: str
    connect: Connect
    default_port: int | None
    tls: bool = False
    in_process: bool = False
