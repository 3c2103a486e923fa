"""Messages from nodes, by what they are: status, answers to work, answers to pings, telemetry. Any other message is
counted and dropped."""

from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from bs_coordinator.dispatch.health import Health
from bs_coordinator.dispatch.prober import Prober
from bs_coordinator.links import LinkMonitor
from bs_coordinator.links.packet_train import ArrivalTiming
from bs_coordinator.nodes.admission import Admission
from bs_coordinator.nodes.registry import NodeRegistry
from bs_coordinator.nodes.telemetry_inbox import TelemetryInbox
from wire import frames, status
from wire.errors import FrameError, ResultContentError
from wire.frame_auth import FrameAuthenticator
from wire.frames import ErrorFrame, PongFrame, RequestId, ResultFrame
from wire.topics import Topics
from wire.transport import Message, Transport


class NodeFrame(NamedTuple):
    """A node's answer to a work frame; the dispatcher knows whether it is awaited."""

    node: str
    frame: ResultFrame | ErrorFrame


class NodeNonsense(NamedTuple):
    """A node's answer to a work frame that can't be used."""

    node: str
    id: RequestId
    reason: str
    why: str


class NodeGone(NamedTuple):
    """A node went offline or was restarted: it will not answer earlier requests."""

    node: str


class MessageRouter:
    """Decodes each message and hands it to the registry, the prober or the telemetry inbox, or back to the dispatcher.

    Attributes:
        dropped: how many messages were of no use, by reason.
        telemetry: the nodes' telemetry.
        fresh_only: ignore retained statuses, because the node that sent one may be dead by now.
    """

    def __init__(
        self,
        topics: Topics,
        registry: NodeRegistry,
        health: Health,
        links: LinkMonitor,
        prober: Prober,
        authenticator: Callable[[str], FrameAuthenticator | None],
    ) -> None:
        """Nothing has arrived yet.

        Args:
            authenticator: gives a node's frame authenticator; None if frames carry no tags, and then a frame with a tag
                is dropped.
        """
        self.dropped: Counter[str] = Counter()
        self.telemetry = TelemetryInbox()
        self.fresh_only = False
        self._topics = topics
        self._registry = registry
        self._health = health
        self._links = links
        self._prober = prober
        self._authenticator = authenticator
        self._arrival_timing = ArrivalTiming()
        self._admission = Admission("statuses")

    def subscribe(self, transport: Transport) -> None:
        """Subscribe to status, results and telemetry of all nodes.

        Raises:
            BrokerError: the broker refuses, or the connection is lost.
        """
        transport.subscribe(self._topics.status("+"), qos=1)
        transport.subscribe(self._topics.results("+"))
        transport.subscribe(self._topics.telemetry("+"))

    def polled(self, began_ns: int, ended_ns: int) -> None:
        """Record that the socket was polled between two readings of `Clock.perf_ns`.

        From it follows how exact the arrival time of the message that ended the poll is.
        """
        self._arrival_timing.read(began_ns, ended_ns)

    def take(self, message: Message) -> NodeFrame | NodeNonsense | NodeGone | None:
        """Route a message; gives what only the dispatcher can handle, else None."""
        topics = self._topics
        if (node := topics.node_of_result(message.topic)) is not None:
            return self._take_frame(node, message)
        if (node := topics.node_of_status(message.topic)) is not None:
            return self._take_status(node, message)
        if (node := topics.node_of_telemetry(message.topic)) is not None:
            self.telemetry.put(node, message)
        return None

    def _take_frame(self, node: str, message: Message) -> NodeFrame | NodeNonsense | None:
        try:
            frame = frames.decode(message.payload, authenticator=self._authenticator(node))
        except ResultContentError as error:
            return NodeNonsense(node, frames.RequestId(*error.id), error.reason, str(error))
        except FrameError as error:
            self.dropped[error.reason] += 1
            return None
        if isinstance(frame, ResultFrame | ErrorFrame):
            return NodeFrame(node, frame)
        if not isinstance(frame, PongFrame):
            self.dropped["kind"] += 1
        elif not self._prober.take(frame, node, message, sure=self._arrival_timing.sure):
            self.dropped["not awaited"] += 1
        return None

    def _take_status(self, node: str, message: Message) -> NodeGone | None:
        if not message.payload:  # this clears a retained message
            return None
        if message.retained and self.fresh_only:
            return None
        if refusal := self._admission.refusal(node, message.arrived_ns / 1e9):
            self.dropped[f"status {refusal}"] += 1
            return None
        try:
            document = status.decode_status(message.payload, node)
        except FrameError as error:
            self.dropped[f"status {error.reason}"] += 1
            return None
        gone = self._registry.apply(document)
        if gone:
            self._health.restarted(node)
        if document.uplink is not None and node in self._registry.nodes:
            self._links.anchor(node, document.uplink, towards_node=False, time_s=message.arrived_ns / 1e9)
        return NodeGone(node) if gone else None
