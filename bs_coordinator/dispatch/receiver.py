"""What nodes send, told apart: who is there, answers to work, answers to pings, telemetry. Whatever is none of these
is counted and dropped."""

from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from bs_coordinator.dispatch.health import Health
from bs_coordinator.dispatch.prober import Prober
from bs_coordinator.links import LinkMonitor
from bs_coordinator.links.packet_train import ArrivalTiming
from bs_coordinator.nodes.registry import NodeRegistry
from bs_coordinator.nodes.telemetry_inbox import TelemetryInbox
from wire import frames, status
from wire.errors import FrameError
from wire.frame_auth import FrameAuthenticator
from wire.frames import ErrorFrame, PongFrame, ResultFrame
from wire.topics import Topics
from wire.transport import Message, Transport


class Answered(NamedTuple):
    """A node's answer to work; whether it is awaited is for the dispatcher to say."""

    node: str
    frame: ResultFrame | ErrorFrame


class Gone(NamedTuple):
    """A node that can no longer answer what it was asked."""

    node: str


class MessageRouter:
    """Messages on their way to whom they concern.

    Attributes:
        dropped: messages that were of no use, by reason.
        telemetry: what nodes tell of themselves.
        fresh_only: take no retained status: it may be a dead node's.
    """

    def __init__(
        self,
        topics: Topics,
        fleet: NodeRegistry,
        health: Health,
        links: LinkMonitor,
        prober: Prober,
        authenticator: Callable[[str], FrameAuthenticator | None],
    ) -> None:
        """Nothing has come yet.

        Args:
            authenticator: by node, what its frames are tagged with; None: only frames without a tag are taken.
        """
        self.dropped: Counter[str] = Counter()
        self.telemetry = TelemetryInbox()
        self.fresh_only = False
        self._topics = topics
        self._fleet = fleet
        self._health = health
        self._links = links
        self._prober = prober
        self._authenticator = authenticator
        self._arrival_timing = ArrivalTiming()

    def subscribe(self, transport: Transport) -> None:
        """Ask for all that nodes send.

        Raises:
            BrokerError: refused, or the connection is lost.
        """
        transport.subscribe(self._topics.status("+"), qos=1)
        transport.subscribe(self._topics.results("+"))
        transport.subscribe(self._topics.telemetry("+"))

    def waited(self, asked_ns: int, arrived_ns: int) -> None:
        """Somebody looked for messages from `asked_ns` to `arrived_ns`: how exact the next one's arrival is."""
        self._arrival_timing.read(asked_ns, arrived_ns)

    def take(self, message: Message) -> Answered | Gone | None:
        """Take in a message; what the dispatcher has to know of it."""
        topics = self._topics
        if (node := topics.node_of_result(message.topic)) is not None:
            return self._take_frame(node, message)
        if (node := topics.node_of_status(message.topic)) is not None:
            return self._take_status(node, message)
        if (node := topics.node_of_telemetry(message.topic)) is not None:
            self.telemetry.put(node, message)
        return None

    def _take_frame(self, node: str, message: Message) -> Answered | None:
        try:
            frame = frames.decode(message.payload, authenticator=self._authenticator(node))
        except FrameError as error:
            self.dropped[error.reason] += 1
            return None
        if isinstance(frame, ResultFrame | ErrorFrame):
            return Answered(node, frame)
        if not isinstance(frame, PongFrame):
            self.dropped["kind"] += 1
        elif not self._prober.take(frame, node, message, sure=self._arrival_timing.sure):
            self.dropped["not awaited"] += 1
        return None

    def _take_status(self, node: str, message: Message) -> Gone | None:
        if not message.payload:  # clears a retained message
            return None
        if message.retained and self.fresh_only:
            return None
        try:
            document = status.decode_status(message.payload, node)
        except FrameError as error:
            self.dropped[f"status {error.reason}"] += 1
            return None
        gone = self._fleet.apply(document)
        if gone:
            self._health.forget(node)
        if document.uplink is not None and node in self._fleet.nodes:
            self._links.anchor(node, document.uplink, towards_node=False, time_s=message.arrived_ns / 1e9)
        return Gone(node) if gone else None
