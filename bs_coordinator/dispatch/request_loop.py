"""The loop around the socket: messages and time become events for `state_machine`, and its commands are executed.

Every wait has a deadline. An answer counts only if session, request and node match; any other message is counted and
dropped.
"""

import logging
from collections import Counter
from collections.abc import Callable, Sequence

from bs_coordinator.dispatch.health import Health
from bs_coordinator.dispatch.holders import Holders
from bs_coordinator.dispatch.layer_requests import LayerRequests, NodeAnswer, SubRequest
from bs_coordinator.dispatch.local_node import LocalNode
from bs_coordinator.dispatch.output_guard import OutputGuard, largest_gain
from bs_coordinator.dispatch.plan_requests import chosen_experts, plan_requests
from bs_coordinator.dispatch.prober import Prober
from bs_coordinator.dispatch.receiver import MessageRouter, NodeFrame, NodeGone, NodeNonsense
from bs_coordinator.dispatch.sender import RequestSender
from bs_coordinator.dispatch.state_machine import (
    AnswerReceived,
    CheckNetwork,
    Command,
    ConnectionLost,
    CountDropped,
    Doubt,
    ErrorReceived,
    Event,
    LearnGain,
    LocalFailed,
    MarkFailed,
    NodeLeft,
    NonsenseReceived,
    NotFiniteReceived,
    Planned,
    Send,
    StopLocal,
    TimePassed,
    transition,
)
from bs_coordinator.errors import ExpertsLostError, PlacementError
from bs_coordinator.nodes.registry import LOCAL_NODE, NodeRegistry
from common.clock import Clock
from wire.errors import BrokerError
from wire.experts import UnitId
from wire.frames import ErrorFrame, RequestId, ResultFrame, Status
from wire.tensors import WireDtype
from wire.transport import Message

log = logging.getLogger(__name__)

_STANDSTILL_S = 0.25
"""A longer time between two polls is added to all deadlines: answers may have come meanwhile, or could not come because
this whole machine stood still."""
_MOST_BACKLOG = 256
"""Messages to read before a request counts as overdue; limited, because a flood of messages must not stop time."""
_PROVE_EVERY_S = 0.25
"""How often nodes that are left out are looked at while a layer is awaited."""

_RESENT_AFTER: dict[type[Event], str] = {
    Planned: "connection_lost",
    AnswerReceived: "nonsense",
    NonsenseReceived: "nonsense",
    NotFiniteReceived: "not_finite",
    ErrorReceived: "refused",
    LocalFailed: "local_failed",
    NodeLeft: "node_left",
    TimePassed: "overdue",
}
"""Why requests are sent again after an event."""


class RequestLoop:
    """Sends the requests of layers and collects their answers.

    Attributes:
        open: the layers under way.
        resent: how many requests were sent again, to other nodes or on a new connection, by reason.
    """

    def __init__(
        self,
        *,
        sender: RequestSender,
        router: MessageRouter,
        holders: Holders,
        registry: NodeRegistry,
        health: Health,
        local: LocalNode | None,
        recover: Callable[[BrokerError], None],
        prober: Prober,
        guard: OutputGuard,
        clock: Clock,
    ) -> None:
        """No layer is under way yet.

        Args:
            local: computes what is asked of the base station itself.
            recover: replaces a lost connection, or raises.
            prober: pings nodes that are left out or silent.
            guard: judges how large answers are.
        """
        self.open: list[LayerRequests] = []
        self.resent: Counter[str] = Counter()
        self._sender = sender
        self._router = router
        self._holders = holders
        self._registry = registry
        self._health = health
        self._local = local
        self._recover = recover
        self._prober = prober
        self._clock = clock
        self._guard = guard
        self._polled_s = self._heard_s = self._now_s()

    def begin(self, layer: LayerRequests) -> None:
        """Choose holders and send a layer's requests.

        Raises:
            PlacementError: no node online holds a chosen expert.
            ExpertsLostError: all holders of a chosen expert are left out.
            BrokerError: the connection is lost and can't be restored in time.
        """
        self.open.append(layer)
        try:
            try:
                self._plan(layer)
            except BrokerError as error:
                self._restart(error, begun=layer)
        except BaseException:
            self.close(layer)
            raise

    def finish(self, layer: LayerRequests) -> None:
        """Wait until a layer is done. After a lost connection, all layers under way are sent again.

        Raises:
            ExpertsLostError: all holders of a chosen expert have failed or are left out.
            DispatchError: the layer took longer than it may.
            BrokerError: the connection is lost and can't be restored in time.
        """
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
            self.close(layer)

    def close(self, layer: LayerRequests) -> None:
        """Stop waiting for a layer; answers that still come are dropped."""
        if layer in self.open:
            self.open.remove(layer)
        if self._local is not None:
            self._local.forget(layer)

    def receive(self, timeout_s: float) -> bool:
        """Wait for one message and take it in; False if none came.

        Raises:
            BrokerError: the connection is lost.
        """
        polled_ns = self._clock.perf_ns()
        message = self._sender.transport.receive(timeout_s)
        self._router.polled(polled_ns, message.arrived_ns if message else self._clock.perf_ns())
        self._notice_standstill(polled_ns / 1e9, timeout_s)
        if message is not None:
            self._heard_s = self._polled_s
            self._take(message)
        return message is not None

    def _notice_standstill(self, polled_s: float, timeout_s: float) -> None:
        """Postpone deadlines if this process did not run for a while before or during a poll."""
        now_s = self._now_s()
        if polled_s - self._polled_s > _STANDSTILL_S:
            self._postpone(self._polled_s, polled_s)
        if now_s - polled_s - timeout_s > _STANDSTILL_S:
            self._postpone(polled_s + timeout_s, now_s)
        self._polled_s = now_s

    def _postpone(self, began_s: float, ended_s: float) -> None:
        for layer in self.open:
            layer.postpone(began_s, ended_s)

    def _now_s(self) -> float:
        return self._clock.perf_ns() / 1e9

    def _plan(self, layer: LayerRequests) -> None:
        """Choose holders and send a layer's requests; earlier ones of this layer no longer count."""
        experts = chosen_experts(layer.gate)
        if layer.only_node is not None:
            holders = dict.fromkeys(experts, layer.only_node)
        else:
            self._holders.refresh(self._now_s())
            holders = {expert: self._holder(layer.layer, expert) for expert in experts}
        requests = plan_requests(layer.gate, holders, max_tokens=self._sender.max_tokens)
        self._handle(layer, Planned(requests, self._now_s()))

    def _holder(self, layer: int, expert: int) -> str:
        node = self._holders.node(layer, expert)
        if node is not None:
            return node
        id = UnitId(layer, expert)
        if not self._registry.holders(id):
            raise PlacementError(self._registry.describe_missing())
        raise ExpertsLostError(self._holders.describe_unusable([id]))

    def _restart(self, lost: BrokerError, *, begun: LayerRequests | None = None) -> None:
        """Connect again and send every layer under way again: requests sent before will not be answered.

        Args:
            begun: the layer that is being begun; if it can't be sent, that is an error of `begin`.

        Raises:
            BrokerError: the broker stays away, or the connection was lost too often over the same requests.
        """
        while True:
            for layer in self.open:
                self._handle(layer, ConnectionLost(str(lost)))
                if self._local is not None:
                    self._local.forget(layer)
                if isinstance(layer.error, BrokerError):
                    raise layer.error from None
            self._recover(lost)
            try:
                for layer in self.open:
                    if layer.done:
                        continue
                    try:
                        self._plan(layer)
                    except (PlacementError, ExpertsLostError) as missing:
                        if layer is begun:
                            raise
                        layer.error = ExpertsLostError(str(missing))
                return
            except BrokerError as again:
                lost = again

    def _collect(self, layer: LayerRequests) -> None:
        """Take in messages until `layer` is done, those for other open layers as well."""
        while not layer.done:
            if layer.error is not None:
                raise layer.error
            if self._local is not None and self._take_local(layer, self._local):
                continue
            now_s = self._now_s()
            wait_s = min(other.next_due_s() for other in self.open) - now_s
            if wait_s <= 0:
                self._judge_time()
                continue
            if not self._health.all_usable:
                self._prober.prove(self._registry.nodes, now_s)
                wait_s = min(wait_s, _PROVE_EVERY_S)
            self.receive(wait_s)

    def _judge_time(self) -> None:
        """Find requests overdue, after reading what has arrived by now."""
        for _ in range(_MOST_BACKLOG):
            if not self.receive(0.0):
                break
        now_s = self._now_s()
        for layer in self.open:
            if now_s >= layer.next_due_s():
                self._handle(layer, TimePassed(now_s, self._heard_s))

    def _take_local(self, layer: LayerRequests, local: LocalNode) -> bool:
        """Take in what was computed locally for a layer; False if there is nothing new."""
        results = local.results(layer, max(0.0, layer.deadline_s - self._now_s()))
        for result in results:
            self._handle(layer, result)
        return bool(results)

    def _take(self, message: Message) -> None:
        """Hand a message to the layer that it concerns."""
        match self._router.take(message):
            case NodeFrame(node, frame):
                if found := self._find(node, frame.id):
                    self._take_frame(*found, frame, message)
            case NodeNonsense(node, id, reason, why):
                if found := self._find(node, id):
                    layer, sub = found
                    if reason == "not-finite":
                        self._handle(layer, self._overflow(sub, why))
                    else:
                        self._handle(layer, NonsenseReceived(sub, reason, why))
            case NodeGone(node):
                for layer in self.open:
                    self._handle(layer, NodeLeft(node))

    def _overflow(self, sub: SubRequest, why: str) -> NotFiniteReceived:
        """A result with infinities: a node refuses to send them, so they come from rounding to the wire's dtype."""
        if self._sender.dtype is WireDtype.FP32:
            return NotFiniteReceived(sub, why)
        return NotFiniteReceived(
            sub, f"an output is too large for {self._sender.dtype.name.lower()} on the wire", on_wire=True
        )

    def _find(self, node: str, id: RequestId) -> tuple[LayerRequests, SubRequest] | None:
        """The layer and the request to `node` with this id; None, counted, if there is none."""
        for layer in self.open:
            sub = layer.find(id)
            if sub is not None and sub.node == node:
                return layer, sub
        self._router.dropped["not awaited"] += 1
        return None

    def _take_frame(
        self, layer: LayerRequests, sub: SubRequest, frame: ResultFrame | ErrorFrame, message: Message
    ) -> None:
        if isinstance(frame, ErrorFrame):
            if frame.status is Status.NOT_FINITE:
                self._handle(layer, NotFiniteReceived(sub, frame.message))
            else:
                self._handle(layer, ErrorReceived(sub, frame.status, frame.message))
            return
        rows = layer.rows(sub.request)
        if frame.layer != layer.layer or frame.output.shape != rows.shape:
            tokens, hidden = frame.output.shape
            why = f"{tokens} × {hidden} values of layer {frame.layer} instead of {len(rows)} × {rows.shape[1]}"
            self._handle(layer, NonsenseReceived(sub, "wrong shape", why))
        elif frame.dtype is not self._sender.dtype:
            why = f"values in {frame.dtype.name.lower()} instead of {self._sender.dtype.name.lower()}"
            self._handle(layer, NonsenseReceived(sub, "wrong dtype", why))
        else:
            gain = largest_gain(rows, frame.output)
            answer = NodeAnswer(
                frame.output, sub.record(frame, message, begun_ns=layer.began_ns), self._guard.excess(layer.layer, gain)
            )
            suspicious, absurd = self._guard.suspects(layer.layer, gain), self._guard.absurd(layer.layer, gain)
            self._handle(layer, AnswerReceived(sub, answer, gain, suspicious, absurd))

    def _handle(self, layer: LayerRequests, event: Event) -> None:
        for command in transition(layer, event, self._holders.others):
            first = isinstance(event, Planned) and not layer.connection_losses
            if isinstance(command, Send) and not first:
                self.resent[_RESENT_AFTER[type(event)]] += len(command.sub_requests)
            self._execute(layer, command)

    def _execute(self, layer: LayerRequests, command: Command) -> None:
        match command:
            case LearnGain(gain):
                self._guard.learn(layer.layer, gain)
            case Send(sub_requests):
                self._send(layer, sub_requests)
            case MarkFailed(node, why, quarantine):
                self._health.failed(node, self._now_s(), why, quarantine=quarantine)
            case Doubt(node, why):
                self._health.doubt(node, self._now_s(), why)
            case CheckNetwork():
                self._prober.ping(self._registry.nodes, self._now_s())
            case CountDropped(reason):
                self._router.dropped[reason] += 1
            case StopLocal(why):
                log.error("the base station no longer computes experts: %s", why)
                self._registry.hold_locally(frozenset())

    def _send(self, layer: LayerRequests, sub_requests: Sequence[SubRequest]) -> None:
        published = self._sender.send(layer, [sub for sub in sub_requests if sub.node != LOCAL_NODE])
        # Local computing starts last, so that it does not delay the nodes' requests.
        if self._local is not None:
            for sub in sub_requests:
                if sub.node == LOCAL_NODE:
                    self._local.send(layer, sub, self._sender.new_id())
        # Predictions take time, so they are made once everything is on its way.
        self._sender.expect(layer, published, lambda node: sum(other.unanswered(node) for other in self.open))
