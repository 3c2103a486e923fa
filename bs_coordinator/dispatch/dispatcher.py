"""Experts on the nodes: a layer's chosen experts become one request per node, and their answers one output.

This module owns the loop around the socket. It turns messages and time into events for `state_machine`, which decides,
and executes the commands that come back. Every wait has a deadline; an answer counts only if session, request and node
match. Any other message is counted and dropped.
"""

import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from bs_coordinator.dispatch.health import QUARANTINE_S, Health
from bs_coordinator.dispatch.holders import Holders
from bs_coordinator.dispatch.join_watch import JoinWatch
from bs_coordinator.dispatch.layer_requests import LayerRequests, Limits, NodeAnswer, SubRequest
from bs_coordinator.dispatch.local_node import LocalExperts, LocalNode
from bs_coordinator.dispatch.output_guard import OutputGuard, largest_gain
from bs_coordinator.dispatch.plan_requests import chosen_experts, plan_requests
from bs_coordinator.dispatch.probe_schedule import ProbeSchedule
from bs_coordinator.dispatch.prober import Prober
from bs_coordinator.dispatch.receiver import MessageRouter, NodeFrame, NodeGone
from bs_coordinator.dispatch.reconnection import Reconnector
from bs_coordinator.dispatch.sender import RequestSender
from bs_coordinator.dispatch.state_machine import (
    AnswerReceived,
    Command,
    ConnectionLost,
    CountDropped,
    ErrorReceived,
    Event,
    LearnGain,
    MarkFailed,
    NodeLeft,
    Planned,
    Send,
    StopLocal,
    TimePassed,
    transition,
)
from bs_coordinator.engine.experts import ExpertOutput
from bs_coordinator.errors import ExpertsLostError, PlacementError
from bs_coordinator.links import LinkMonitor
from bs_coordinator.nodes.clock_offsets import ClockSample
from bs_coordinator.nodes.registry import LOCAL_NODE, NodeRegistry
from bs_coordinator.nodes.telemetry_inbox import TelemetryInbox
from bs_coordinator.selection.forecast import LayerForecast
from common.clock import SYSTEM_CLOCK, Clock
from common.errors import WdmoeError
from wire.errors import BrokerError
from wire.experts import ExpertId, format_selector
from wire.frame_auth import ClusterKey
from wire.frames import ErrorFrame, ResultFrame
from wire.status import SocketFacts
from wire.tensors import Array, WireDtype
from wire.topics import Topics
from wire.transport import Message, Transport

log = logging.getLogger(__name__)

_CLOCK_EVERY_S = 0.05


def _no_facts() -> Mapping[str, SocketFacts]:
    return {}


class PendingLayer:
    """A layer whose experts were asked (`bs_coordinator.engine.experts.Pending`)."""

    def __init__(self, dispatcher: "Dispatcher", layer: LayerRequests) -> None:
        self._dispatcher = dispatcher
        self._layer = layer

    def result(self) -> ExpertOutput:
        """Wait for the answers and add them up. After a lost connection, what is under way is sent again.

        Raises:
            ExpertsLostError: all holders of a chosen expert have failed or are left out.
            DispatchError: the layer took longer than it may.
            BrokerError: the connection is lost and can't be restored in time.
        """
        return self._dispatcher._result(self._layer)

    def cancel(self) -> None:
        """Stop waiting; answers that still come are dropped."""
        self._dispatcher._close(self._layer)


class _Done(NamedTuple):
    """A layer that is done, the answers that counted, and how long it took."""

    layer: LayerRequests
    answers: list[tuple[SubRequest, NodeAnswer]]
    took_ns: int


class Dispatcher:
    """All experts of a model, on the nodes of a cluster (`bs_coordinator.engine.experts.Experts`).

    Attributes:
        registry: which node is online and holds which experts.
        links: estimates of the nodes and their links.
        health: which nodes are left out.
        local: experts that the base station computes itself; None without any.
        clock: what every deadline and duration is read from.
    """

    def __init__(
        self,
        transport: Transport,
        topics: Topics,
        registry: NodeRegistry,
        *,
        dtype: WireDtype,
        timeout_s: float,
        last_holder_s: float | None = None,
        reconnect: Callable[[], Transport] | None = None,
        links: LinkMonitor | None = None,
        broker_sockets: Callable[[], Mapping[str, SocketFacts]] = _no_facts,
        cluster_key: ClusterKey | None = None,
        local_experts: LocalExperts | None = None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        """Subscribe to status, results and telemetry.

        Args:
            dtype: of hidden states on the wire.
            timeout_s: how long one layer may wait for its nodes.
            last_holder_s: how long an overdue request waits if no other node holds its experts, before they are
                reported as lost; `timeout_s` if None.
            reconnect: opens a new connection after one is lost; without it a lost connection is an error.
            broker_sockets: gives new facts about the broker's connections to its clients, by the clients' endpoints.
            cluster_key: frames are authenticated with it, and frames that are not are dropped.
            local_experts: experts that the base station computes itself.
            clock: what every deadline and duration is read from.
        """
        self.registry = registry
        self.links = links or LinkMonitor()
        self.health = Health()
        self.clock = clock
        self._sender = RequestSender(
            transport, topics, self.links,
            hidden=registry.dims.hidden, dtype=dtype, timeout_s=timeout_s, cluster_key=cluster_key, clock=clock,
        )  # fmt: skip
        last_holder_s = timeout_s if last_holder_s is None else min(last_holder_s, timeout_s)
        self._limits = Limits(timeout_s, last_holder_s, self._sender.max_tokens)
        self._dtype = dtype
        self._guard = OutputGuard(registry.dims.layers)
        self._join_watch = JoinWatch()
        self._holders = Holders(
            registry,
            self.health,
            self.links,
            message_bytes=self._sender.frame_bytes[0] + self._sender.row_bytes[1],
            last_resort=last_holder_s >= timeout_s,
        )
        self.local = None
        if local_experts is not None:
            self.local = LocalNode(
                local_experts, links=self.links, registry=registry, holders=self._holders, clock=clock
            )  # fmt: skip
        self._prober = Prober(self.links, self.health, self._sender.send_ping, self._sender.new_id, clock=clock)
        self._schedule = ProbeSchedule(
            self._prober, self.links, registry, broker_sockets=broker_sockets, clock=clock
        )  # fmt: skip
        self._router = MessageRouter(
            topics, registry, self.health, self.links, self._prober, self._sender.authenticator
        )  # fmt: skip
        self._reconnector = Reconnector(
            reconnect, sender=self._sender, router=self._router, registry=registry, pump=self.pump, clock=clock
        )  # fmt: skip
        self._open: list[LayerRequests] = []
        self._done: list[_Done] = []
        self._router.subscribe(transport)

    def begin(self, layer: int, hidden: Array, gate: Array) -> PendingLayer:
        """Send a layer's requests. Several layers may be under way at once.

        Args:
            layer: index of the layer.
            hidden: float32 [tokens, hidden].
            gate: float32 [tokens, experts], zero where an expert is not chosen.

        Raises:
            PlacementError: no node online holds a chosen expert.
            ExpertsLostError: all holders of a chosen expert are left out.
            BrokerError: the connection is lost and can't be restored in time.
        """
        if self.local is not None:
            self.local.observe(layer, gate)
        return self._begin(LayerRequests(layer, hidden, gate, self._limits, began_ns=self.clock.perf_ns()))

    def apply(self, layer: int, hidden: Array, gate: Array) -> ExpertOutput:
        """Send a layer's requests, wait for the answers and add them up.

        Raises:
            PlacementError, ExpertsLostError, DispatchError, BrokerError: as of `begin` and `PendingLayer.result`.
        """
        return self.begin(layer, hidden, gate).result()

    def ask(self, node: str, layer: int, hidden: Array, gate: Array) -> ExpertOutput:
        """As `apply`, but send everything to `node`, even if it is left out, and to no other node if it fails."""
        began_ns = self.clock.perf_ns()
        return self._begin(
            LayerRequests(layer, hidden, gate, self._limits, began_ns=began_ns, only_node=node)
        ).result()  # fmt: skip

    @property
    def dropped(self) -> Counter[str]:
        """How many messages were of no use so far, by reason."""
        return Counter(self._router.dropped)

    @property
    def telemetry(self) -> TelemetryInbox:
        """The nodes' telemetry."""
        return self._router.telemetry

    @property
    def holder_names(self) -> Sequence[str]:
        """The nodes that experts are asked of, in the order of a forecast's nodes."""
        self._holders.refresh(self._now_s())
        return tuple(self._holders.names)

    def forecast(self, layer: int) -> LayerForecast:
        """What asking for this layer's experts is predicted to cost now."""
        now_s = self._now_s()
        self._holders.refresh(now_s)
        return self.links.forecast(
            layer,
            self._holders.names,
            self._holders.index(layer),
            available=self._holders.available(layer),
            now_s=now_s,
            frame_bytes=self._sender.frame_bytes,
            row_bytes=self._sender.row_bytes,
        )

    def probe(self) -> None:
        """Send the link probes that are due, if any. Their answers are taken in whenever they come.

        Raises:
            BrokerError: the connection is lost.
        """
        if self._schedule.due(working=bool(self._open)):
            self._learn()
            self._schedule.probe(self._open)

    def measure_links(self, seconds: float) -> None:
        """Probe idle links for this long."""
        until_s = self._now_s() + seconds
        while (remaining_s := until_s - self._now_s()) > 0:
            self.probe()
            self.pump(min(remaining_s, 0.01))

    def ask_clocks(self) -> None:
        """Ask all nodes for the time; `clock_samples` gives the answers once they have come."""
        self._prober.ask_clocks(self.registry.nodes, self._now_s())

    def clock_samples(self) -> list[ClockSample]:
        """What nodes' clocks showed since the last call."""
        return self._prober.take_clocks()

    def measure_clocks(self, seconds: float) -> None:
        """Ask all nodes for the time repeatedly, for this long."""
        until_s = self._now_s() + seconds
        while (remaining_s := until_s - self._now_s()) > 0:
            self.ask_clocks()
            self.pump(min(remaining_s, _CLOCK_EVERY_S))

    def pump(self, timeout_s: float) -> None:
        """Receive messages for this long while no layer is awaited; this keeps the connection alive.

        Nodes that were left out prove themselves meanwhile: otherwise a base station that can't work because all
        nodes are left out would never use them again.
        """
        until_s = self._now_s() + timeout_s
        while (remaining_s := until_s - self._now_s()) > 0:
            self._prober.prove(self.registry.nodes, self._now_s())
            if message := self._receive(remaining_s):
                self._take(message)

    def recover(self, lost: BrokerError) -> None:
        """Connect again after the connection was lost.

        Raises:
            BrokerError: there is no way to reconnect, or the broker stays away.
        """
        self._reconnector.recover(lost)

    def close(self) -> None:
        """Close the connection to the broker."""
        self._sender.transport.close()

    def _now_s(self) -> float:
        # The clock of `Message.arrived_ns`, which links are timed by.
        return self.clock.perf_ns() / 1e9

    def _receive(self, timeout_s: float) -> Message | None:
        polled_ns = self.clock.perf_ns()
        message = self._sender.transport.receive(timeout_s)
        self._router.polled(polled_ns, message.arrived_ns if message else self.clock.perf_ns())
        return message

    def _begin(self, layer: LayerRequests) -> PendingLayer:
        self._open.append(layer)
        try:
            try:
                self._plan(layer)
            except BrokerError as error:
                self._restart(error, begun=layer)
        except WdmoeError:
            self._close(layer)
            raise
        # Done while the nodes compute, because it would delay the next layer. Links of nodes that have no request are
        # idle now, and answers to probes are read at once.
        self._learn()
        self._probe_meanwhile()
        return PendingLayer(self, layer)

    def _plan(self, layer: LayerRequests) -> None:
        """Choose holders and send a layer's requests; earlier ones of this layer no longer count."""
        experts = chosen_experts(layer.gate)
        if layer.only_node is not None:
            holders = dict.fromkeys(experts, layer.only_node)
        else:
            self._holders.refresh(self._now_s())
            holders = {expert: self._holder(layer.layer, expert) for expert in experts}
        requests = plan_requests(layer.gate, holders, max_tokens=self._limits.max_tokens)
        self._handle(layer, Planned(requests, self._now_s()))

    def _holder(self, layer: int, expert: int) -> str:
        node = self._holders.node(layer, expert)
        if node is not None:
            return node
        id = ExpertId(layer, expert)
        online = self.registry.holders(id)
        if not online:
            raise PlacementError(self.registry.describe_missing())
        reasons = ", ".join(f"'{n}' ({self.health.why(n)})" for n in online)
        raise ExpertsLostError(f"every node that holds {format_selector([id])} is left out for now: {reasons}")

    def _restart(self, lost: BrokerError, *, begun: LayerRequests | None = None) -> None:
        """Connect again and send every layer under way again: requests sent before will not be answered.

        Args:
            begun: the layer that is being begun; if it can't be sent, that is an error of `begin`.

        Raises:
            BrokerError: the broker stays away, or the connection was lost too often over the same requests.
        """
        while True:
            for layer in self._open:
                self._handle(layer, ConnectionLost(str(lost)))
                if isinstance(layer.error, BrokerError):
                    raise layer.error from None
            self.recover(lost)
            try:
                for layer in [layer for layer in self._open if not layer.done]:
                    try:
                        self._plan(layer)
                    except (PlacementError, ExpertsLostError) as missing:
                        if layer is begun:
                            raise
                        layer.error = ExpertsLostError(str(missing))
                return
            except BrokerError as again:
                lost = again

    def _result(self, layer: LayerRequests) -> ExpertOutput:
        try:
            while True:
                try:
                    self._collect(layer)
                    break
                except BrokerError as error:
                    if error is layer.error:
                        raise
                    self._restart(error)
        finally:
            self._close(layer)
        answers = layer.answers()
        self._done.append(_Done(layer, answers, self.clock.perf_ns() - layer.began_ns))
        output = ExpertOutput(layer.output(), tuple(answer.record for _, answer in answers))
        if self.links.shared_air or {sub.node for sub in layer.sub_requests}.issuperset(self.registry.nodes):
            self._probe_meanwhile()
        return output

    def _close(self, layer: LayerRequests) -> None:
        if layer in self._open:
            self._open.remove(layer)
        if self.local is not None:
            self.local.forget(layer)

    def _collect(self, layer: LayerRequests) -> None:
        """Take in messages until `layer` is done, those for other open layers as well."""
        while not layer.done:
            if layer.error is not None:
                raise layer.error
            now_s = self._now_s()
            if self.local is not None:
                results = self.local.results(layer, max(0.0, layer.deadline_s - now_s))
                for result in results:
                    self._handle(layer, result)
                if results:
                    continue
                now_s = self._now_s()
            until_s = layer.deadline_s
            for other in self._open:
                self._handle(other, TimePassed(now_s))
                until_s = min(until_s, other.next_overdue_s())
            if layer.error is None and (message := self._receive(max(0.0, until_s - now_s))) is not None:
                self._take(message)

    def _take(self, message: Message) -> None:
        """Hand a message to the layer that it concerns."""
        match self._router.take(message):
            case NodeFrame(node, frame):
                for layer in self._open:
                    sub = layer.find(frame.id)
                    if sub is not None and sub.node == node:
                        self._take_frame(layer, sub, frame, message)
                        return
                self._router.dropped["not awaited"] += 1
            case NodeGone(node):
                for layer in self._open:
                    self._handle(layer, NodeLeft(node))

    def _take_frame(
        self, layer: LayerRequests, sub: SubRequest, frame: ResultFrame | ErrorFrame, message: Message
    ) -> None:
        if isinstance(frame, ErrorFrame):
            self._handle(layer, ErrorReceived(sub, frame.status, frame.message))
            return
        rows = layer.rows(sub.request)
        if frame.layer != layer.layer or frame.output.shape != rows.shape:
            self._router.dropped["wrong shape"] += 1
        elif frame.dtype is not self._dtype:
            self._router.dropped["wrong dtype"] += 1
        else:
            gain = largest_gain(rows, frame.output)
            answer = NodeAnswer(frame.output, sub.record(frame, message))
            self._handle(layer, AnswerReceived(sub, answer, gain, self._guard.suspects(layer.layer, gain)))

    def _handle(self, layer: LayerRequests, event: Event) -> None:
        for command in transition(layer, event, self._holders.others):
            self._execute(layer, command)

    def _execute(self, layer: LayerRequests, command: Command) -> None:
        match command:
            case LearnGain(rows, gain):
                self._guard.learn(layer.layer, rows, gain)
            case Send(sub_requests):
                self._send(layer, sub_requests)
            case MarkFailed(node, why, quarantine):
                self.health.failed(node, self._now_s(), why, least_pause_s=QUARANTINE_S if quarantine else 0.0)
            case CountDropped(reason):
                self._router.dropped[reason] += 1
            case StopLocal(why):
                log.error("the base station computes no experts any more: %s", why)
                if self.local is not None:
                    self.local.stop()

    def _send(self, layer: LayerRequests, sub_requests: Sequence[SubRequest]) -> None:
        published = self._sender.send(layer, [sub for sub in sub_requests if sub.node != LOCAL_NODE])
        # Local computing starts last, so that it does not delay the nodes' requests.
        for sub in sub_requests:
            if self.local is not None and sub.node == LOCAL_NODE:
                self.local.send(layer, sub, self._sender.new_id())
        # Predictions take time, so they are made once everything is on its way.
        self._sender.expect(layer, published, lambda node: sum(other.unanswered(node) for other in self._open))

    def _learn(self) -> None:
        """Update the estimates of links and nodes from the layers that are done."""
        done, self._done = self._done, []
        for layer, answers, took_ns in done:
            self.links.observe([sub.sample(answer.record) for sub, answer in answers])
            if layer.only_node is None and len(layer.hidden) == 1:
                slowest = max((answer.record for _, answer in answers), key=lambda record: record.round_trip_ns).node
                if warning := self._join_watch.observe(self.registry.nodes, took_ns, slowest):
                    log.warning("%s", warning)

    def _probe_meanwhile(self) -> None:
        """Probe beside other work. A lost connection is left to whatever sends or receives next."""
        with contextlib.suppress(BrokerError):
            self.probe()
