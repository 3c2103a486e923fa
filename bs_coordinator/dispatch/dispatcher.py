"""Experts on the nodes: a layer's chosen experts become one request per node, their answers one output.

Every wait has a deadline, every answer is matched by session, request and node; whatever else arrives is counted and
dropped. A request that fails or is overdue goes to other holders of its experts; where there are none, the experts
are reported as lost.
"""

import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from tenacity import Retrying, retry_if_exception, wait_random_exponential

from bs_coordinator.dispatch.health import QUARANTINE_S, Health
from bs_coordinator.dispatch.holders import Holders
from bs_coordinator.dispatch.join_watch import JoinWatch
from bs_coordinator.dispatch.layer_requests import LayerRequests, NodeAnswer, SubRequest
from bs_coordinator.dispatch.output_guard import OutputGuard, agree, largest_gain
from bs_coordinator.dispatch.plan_requests import chosen_experts, plan_requests
from bs_coordinator.dispatch.prober import Prober
from bs_coordinator.dispatch.receiver import Answered, Gone, MessageRouter
from bs_coordinator.dispatch.sender import RequestSender
from bs_coordinator.engine.experts import ExpertOutput
from bs_coordinator.errors import DispatchError, ExpertsLostError, PlacementError
from bs_coordinator.links import LinkMonitor
from bs_coordinator.nodes.clock_offsets import ClockSample
from bs_coordinator.nodes.registry import LOCAL_NODE, NodeRegistry
from bs_coordinator.nodes.telemetry_inbox import TelemetryInbox
from bs_coordinator.selection.forecast import LayerForecast
from common.clock import SYSTEM_CLOCK, Clock
from common.errors import WdmoeError
from wire.errors import BrokerAuthError, BrokerError
from wire.experts import ExpertId, format_selector
from wire.frame_auth import ClusterKey
from wire.frames import TARGET_FRAME_BYTES, ErrorFrame, ResultFrame, Status
from wire.status import SocketFacts
from wire.tensors import Array, WireDtype
from wire.topics import Topics
from wire.transport import Message, Transport

if TYPE_CHECKING:
    from bs_coordinator.resident import ResidentHolder

log = logging.getLogger(__name__)

_BROKER_PATIENCE_S = 60.0
_NODES_PATIENCE_S = 12.0
"""After the broker is back: nodes try again within seconds of each other and tell their status every few seconds."""
_PROBE_LOOK_S = 0.01
"""Between two looks at which probes are due; the links' own pauses between probes are longer."""
_CLOCK_EVERY_S = 0.05
_MOST_LOSSES = 4
"""Connections lost over one layer's requests: a broker that restarts is away once, one that hangs up on what it is
sent does so each time."""


def _no_facts() -> Mapping[str, SocketFacts]:
    return {}


class Asked:
    """A layer's experts that were asked (`bs_coordinator.engine.model.Pending`).

    Attributes:
        node: the only one that may be asked; None for whoever holds the experts.
        round: its requests under way.
        losses: connections lost meanwhile.
    """

    round: LayerRequests

    def __init__(self, dispatcher: "Dispatcher", layer: int, hidden: Array, gate: Array, node: str | None) -> None:
        self._dispatcher = dispatcher
        self.layer = layer
        self.hidden = hidden
        self.gate = gate
        self.node = node
        self.losses = 0
        self.began_ns = dispatcher.clock.perf_ns()

    def result(self) -> ExpertOutput:
        """Wait for the answers and add them up. After a lost connection, everything under way is asked again.

        Raises:
            ExpertsLostError: all holders of a chosen expert failed or are left out.
            DispatchError: the layer took longer than it may.
            BrokerError: the connection is lost and can't be had again in time.
        """
        return self._dispatcher._result(self)

    def cancel(self) -> None:
        """Don't wait for it any more."""
        self._dispatcher._cancel(self)


class _Done(NamedTuple):
    """A round that is done, and how long it took."""

    round: LayerRequests
    parts: list[tuple[SubRequest, NodeAnswer]]
    took_ns: int


class Dispatcher:
    """All experts of a model, on the nodes of a fleet (`bs_coordinator.engine.model.Experts`).

    Attributes:
        links: what is known of the nodes and their links.
        health: which nodes are left out.
        clock: what every deadline and duration is read from.
    """

    def __init__(
        self,
        transport: Transport,
        topics: Topics,
        fleet: NodeRegistry,
        *,
        dtype: WireDtype,
        timeout_s: float,
        last_holder_s: float | None = None,
        reconnect: Callable[[], Transport] | None = None,
        links: LinkMonitor | None = None,
        broker_sockets: Callable[[], Mapping[str, SocketFacts]] = _no_facts,
        cluster_key: ClusterKey | None = None,
        here: "ResidentHolder | None" = None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        """Subscribe to status and results.

        Args:
            dtype: how hidden states travel.
            timeout_s: how long one layer may wait for its nodes.
            last_holder_s: how long an overdue request is awaited whose experts nobody else holds, before they are
                reported as lost; `timeout_s` if None.
            reconnect: connects to the broker again after the connection was lost; without it that is an error.
            broker_sockets: gives new facts of the broker's connections to its clients, by the clients' endpoints.
            cluster_key: frames carry tags, and only those that do are taken.
            here: experts that are computed here.
            clock: what every deadline and duration is read from.
        """
        self.clock = clock
        self._here = here
        self.links = links or LinkMonitor()
        self.health = Health()
        self.fleet = fleet
        self._sender = RequestSender(
            transport, topics, self.links,
            hidden=fleet.dims.hidden, dtype=dtype, timeout_s=timeout_s, cluster_key=cluster_key,
            clock=clock,
        )  # fmt: skip
        self._timeout_s = timeout_s
        self._last_holder_s = timeout_s if last_holder_s is None else min(last_holder_s, timeout_s)
        self._join_watch = JoinWatch()
        self._guard = OutputGuard(fleet.dims.layers)
        self._reconnect = reconnect
        self._broker_sockets = broker_sockets
        self._holders = Holders(
            fleet,
            self.health,
            self.links,
            message_bytes=self._sender.frame_bytes[0] + self._sender.row_bytes[1],
            last_resort=last_holder_s is None,
        )
        self._prober = Prober(self.links, self.health, self._sender.send_ping, self._sender.new_id, clock=clock)
        self._router = MessageRouter(topics, fleet, self.health, self.links, self._prober, self._sender.authenticator)
        self._open: list[Asked] = []
        self._done: list[_Done] = []
        self._next_probe_s = 0.0
        self._router.subscribe(transport)

    def begin(self, layer: int, hidden: Array, gate: Array) -> "Asked":
        """Ask the nodes (see `Experts.begin`). Several layers' work may be under way at once.

        Raises:
            PlacementError: no node online holds a chosen expert.
            ExpertsLostError: all holders of a chosen expert are left out.
            BrokerError: the connection is lost and can't be had again in time.
        """
        if self._here is not None:
            self._here.experts.traffic.observe(layer, gate)
            self.tend_residents()
        return self._begin(Asked(self, layer, hidden, gate, None))

    def apply(self, layer: int, hidden: Array, gate: Array) -> ExpertOutput:
        """Ask the nodes and add up their answers.

        Raises:
            PlacementError, ExpertsLostError, DispatchError, BrokerError: see `begin` and `Asked.result`.
        """
        return self.begin(layer, hidden, gate).result()

    def ask(self, node: str, layer: int, hidden: Array, gate: Array) -> ExpertOutput:
        """The same of one node, whatever else is known of it."""
        return self._begin(Asked(self, layer, hidden, gate, node)).result()

    @property
    def dropped(self) -> Counter[str]:
        """Messages that were not an awaited answer, by reason."""
        return self._router.dropped

    @property
    def telemetry(self) -> TelemetryInbox:
        """What nodes tell of themselves."""
        return self._router.telemetry

    @property
    def holder_names(self) -> Sequence[str]:
        """The nodes that experts are asked of, in the order of a forecast's nodes."""
        self._holders.refresh(self.clock.monotonic_s())
        return self._holders.names

    def forecast(self, layer: int) -> LayerForecast:
        """See `Experts.forecast`."""
        now_s = self.clock.monotonic_s()
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

    def fill_residents(self) -> None:
        """Load the experts that are worth keeping here, by their traffic so far and who is online now.

        Raises:
            BundleError, StorageError, ProbeError: one can't be loaded.
        """
        if self._here is None:
            return
        filled = self._here.experts.fill(self._holders.away_s(), self._holders.here_s())
        while not filled.done():
            self.pump(0.05)
        self.fleet.hold_locally(filled.result())

    def tend_residents(self, *, review: bool = False) -> None:
        """Take in which experts are kept here by now, and see to it that they are those worth keeping. Cheap.

        Args:
            review: now, not only when that is due.
        """
        if self._here is None:
            return
        experts = self._here.experts
        if (ids := experts.changes()) is not None:
            self.fleet.hold_locally(ids)
        if review or experts.review_is_due():
            experts.review(self._holders.away_s(), self._holders.here_s())

    def probe(self) -> None:
        """Send the probes that are due, if any, to nodes that have no work under way, and none that shares the air with
        such work; answers are taken in whenever they come."""
        now_s = self.clock.monotonic_s()
        if now_s < self._next_probe_s or (self._open and self.links.shared_air):
            return
        self._next_probe_s = now_s + _PROBE_LOOK_S
        self._learn()
        for endpoint, facts in self._broker_sockets().items():
            if (node := self.fleet.node_at(endpoint)) is not None:
                self.links.anchor(node, facts, towards_node=True, time_s=now_s)
        busy = {part.request.node for asked in self._open for part in asked.round.open()}
        self._prober.probe([node for node in self.fleet.nodes if node not in busy], now_s)

    def _probe_meanwhile(self) -> None:
        """Probe while answers are made. A lost connection is left to whoever sends or awaits work next."""
        with contextlib.suppress(BrokerError):
            self.probe()

    def measure_links(self, seconds: float) -> None:
        """Probe idle links for a while."""
        deadline = self.clock.monotonic_s() + seconds
        while (remaining := deadline - self.clock.monotonic_s()) > 0:
            self.probe()
            self.pump(min(remaining, 0.01))

    def ask_clocks(self) -> None:
        """Ask all nodes what time it is; answers are taken in whenever they come, see `clock_samples`."""
        self._prober.ask_clocks(self.fleet.nodes, self.clock.monotonic_s())

    def clock_samples(self) -> list[ClockSample]:
        """What nodes' clocks showed since the last call."""
        return self._prober.take_clocks()

    def measure_clocks(self, seconds: float) -> None:
        """Ask idle nodes what time it is, over and over."""
        deadline = self.clock.monotonic_s() + seconds
        while (remaining := deadline - self.clock.monotonic_s()) > 0:
            self.ask_clocks()
            self.pump(min(remaining, _CLOCK_EVERY_S))

    def pump(self, timeout_s: float) -> None:
        """Take in status messages while nothing is asked; keeps the connection alive."""
        deadline = self.clock.monotonic_s() + timeout_s
        while (remaining := deadline - self.clock.monotonic_s()) > 0:
            message = self._receive(remaining)
            if message:
                self._router.take(message)

    def _receive(self, timeout_s: float) -> Message | None:
        asked_ns = self.clock.perf_ns()
        message = self._sender.transport.receive(timeout_s)
        self._router.waited(asked_ns, message.arrived_ns if message else self.clock.perf_ns())
        return message

    def close(self) -> None:
        """Leave the broker."""
        self._sender.transport.close()

    def recover(self, lost: BrokerError) -> None:
        """Connect again after a loss, and hear from the nodes again: what they said before, another broker heard.

        Raises:
            BrokerError: `lost`, or the last error, when the broker stays away.
        """
        if self._reconnect is None:
            raise lost
        log.warning("%s; trying again for %.0f s", lost, _BROKER_PATIENCE_S)
        self._sender.transport.close()
        give_up_s = self.clock.monotonic_s() + _BROKER_PATIENCE_S
        attempts = Retrying(
            stop=lambda state: self.clock.monotonic_s() >= give_up_s,
            sleep=self.clock.sleep_s,
            wait=wait_random_exponential(multiplier=0.2, max=3.0),
            retry=retry_if_exception(lambda e: isinstance(e, BrokerError) and not isinstance(e, BrokerAuthError)),
            reraise=True,
        )
        attempts(self._rejoin, self._reconnect)
        log.warning("the broker is back, %d nodes are online", len(self.fleet.nodes))

    def _rejoin(self, connect: Callable[[], Transport]) -> None:
        self._sender.transport = connect()
        self.fleet.forget()
        self._router.fresh_only = True
        try:
            self._router.subscribe(self._sender.transport)
            deadline = self.clock.monotonic_s() + _NODES_PATIENCE_S
            while self.fleet.missing() and self.clock.monotonic_s() < deadline:
                self.pump(0.1)
        finally:
            self._router.fresh_only = False

    def _holder(self, layer: int, expert: int) -> str:
        node = self._holders.node(layer, expert)
        if node is not None:
            return node
        id = ExpertId(layer, expert)
        online = self.fleet.holders(id)
        if not online:
            raise PlacementError(self.fleet.describe_missing())
        reasons = ", ".join(f"'{n}' ({self.health.why(n)})" for n in online)
        raise ExpertsLostError(f"{format_selector([id])} can't be had: left out for now: {reasons}")

    def _begin(self, asked: "Asked") -> "Asked":
        try:
            try:
                self._ask(asked)
            except BrokerError as error:
                self._ask_again(error, asked)
        except WdmoeError:
            self._cancel(asked)
            raise
        # While the nodes compute: what the last answers taught. It would only hold up the next layer. Links of nodes
        # that are not asked are free now, and what comes from them is read at once.
        self._learn()
        self._probe_meanwhile()
        return asked

    def _ask(self, asked: "Asked") -> None:
        """Send a layer's requests; whatever was sent of them before is forgotten."""
        if asked.node is not None:
            holder = dict.fromkeys(chosen_experts(asked.gate), asked.node)
        else:
            self._holders.refresh(self.clock.monotonic_s())
            holder = {expert: self._holder(asked.layer, expert) for expert in chosen_experts(asked.gate)}
        requests = plan_requests(asked.gate, holder, max_tokens=self._sender.max_tokens)
        asked.round = LayerRequests(
            asked.layer, asked.hidden, requests,
            reroute=asked.node is None, deadline_s=self.clock.monotonic_s() + self._timeout_s,
        )  # fmt: skip
        if asked not in self._open:
            self._open.append(asked)
        self._send(asked.round, asked.round.parts)

    def _ask_again(self, error: BrokerError, *more: "Asked") -> None:
        """After the broker is back: nobody will answer what was asked before.

        Raises:
            BrokerError: it stays away, or was lost too often over the same requests.
        """
        lost: BrokerError | None = error
        while lost is not None:
            under_way = list(dict.fromkeys([*self._open, *more]))
            for asked in under_way:
                asked.losses += 1
                if asked.losses > _MOST_LOSSES:
                    raise BrokerError(
                        f"{lost}; it was the {asked.losses}th time while layer {asked.layer} was asked for: does the "
                        f"broker refuse messages of {TARGET_FRAME_BYTES >> 10} KiB "
                        "(mosquitto: message_size_limit, max_packet_size)?"
                    ) from None
            self.recover(lost)
            lost = None
            for asked in under_way:
                try:
                    self._ask(asked)
                except BrokerError as again:
                    lost = again
                    break
                except (PlacementError, ExpertsLostError) as missing:
                    if asked in more:
                        raise
                    asked.round.lost = str(missing)

    def _result(self, asked: "Asked") -> ExpertOutput:
        try:
            while True:
                try:
                    self._collect(asked.round)
                    break
                except BrokerError as error:
                    self._ask_again(error)
        finally:
            self._cancel(asked)
        round = asked.round
        self._compare(round)
        answered = [(part, answer) for top in round.parts for part in top.answered() if (answer := part.answer)]
        output = np.zeros(round.hidden.shape, np.float32)
        # Added in the order of asking, not of arrival: floating-point sums depend on it.
        for part, answer in answered:
            if len(answer.output) == len(output):
                output += answer.output
            else:
                output[part.request.rows] += answer.output
        records = tuple(answer.record for _, answer in answered)
        self._done.append(_Done(round, answered, self.clock.perf_ns() - asked.began_ns))
        if self.links.shared_air or {part.request.node for part in round.parts}.issuperset(self.fleet.nodes):
            self._probe_meanwhile()
        return ExpertOutput(output, records)

    def _cancel(self, asked: "Asked") -> None:
        if asked in self._open:
            self._open.remove(asked)

    def _learn(self) -> None:
        """What answered requests say of links and nodes."""
        done, self._done = self._done, []
        for round, parts, took_ns in done:
            self.links.observe([part.sample(answer.record) for part, answer in parts])
            if round.reroute and len(round.hidden) == 1:
                slowest = max((answer.record for _, answer in parts), key=lambda record: record.round_trip_ns).node
                if warning := self._join_watch.observe(self.fleet.nodes, took_ns, slowest):
                    log.warning("%s", warning)

    def _send(self, round: LayerRequests, parts: Sequence[SubRequest]) -> None:
        away = [part for part in parts if part.request.node != LOCAL_NODE]
        published = self._sender.send(round, away)
        # What is computed here comes last: the nodes should not wait for it.
        for part in parts:
            if self._here and part.request.node == LOCAL_NODE:
                self._here.ask(round, part, self._sender.new_id())
        # All are on their way before anything is predicted.
        self._sender.expect(round, published, lambda node: sum(asked.round.unanswered(node) for asked in self._open))

    def _take_from_here(self, round: LayerRequests) -> bool:
        """Take in what was computed here; whether there was anything."""
        answered = (
            self._here.answered(round, max(0.0, round.deadline_s - self.clock.monotonic_s())) if self._here else []
        )
        for part, answer in answered:
            if isinstance(answer, NodeAnswer):
                gain = largest_gain(round.hidden[part.request.rows], answer.output)
                self._guard.learn(round.layer, len(answer.output), gain)
                round.settle(part, answer)
            else:
                log.error("nothing is computed here any more: %s", answer)
                self.fleet.hold_locally(frozenset())
                self._failed(round, part, f"{_experts(round, part)} could not be computed here: {answer}")
        return bool(answered)

    def _collect(self, round: LayerRequests) -> None:
        """Take in messages until a round is done; those for other rounds as well."""
        while not round.done:
            if round.lost:
                raise ExpertsLostError(round.lost)
            if self._take_from_here(round):
                continue
            now = self.clock.monotonic_s()
            if now >= round.deadline_s:
                late = ", ".join(sorted({part.request.node for part in round.open() if not part.failed}))
                for part in round.open():
                    if part.request.node != LOCAL_NODE:
                        self.health.failed(part.request.node, self.clock.monotonic_s(), "did not answer in time")
                raise DispatchError(
                    f"no answer for layer {round.layer} from {late} within {self._timeout_s:g} s"
                    ": is the device overloaded or its link down? (--layer-timeout)"
                )
            until = round.deadline_s
            for other in [asked.round for asked in self._open]:
                for part in other.overdue(now):
                    self._overdue(other, part)
                until = min(until, other.next_overdue_s())
            if round.lost:
                continue
            message = self._receive(max(0.0, until - now))
            if message is not None:
                self._take_in(message)

    def _take_in(self, message: Message) -> None:
        match self._router.take(message):
            case Gone(gone):
                for round in [asked.round for asked in self._open]:
                    for part in round.open():
                        if part.request.node == gone and not part.failed:
                            why = f"node '{gone}' left while {_experts(round, part)} was asked of it"
                            self._failed(round, part, why)
            case Answered(node, frame):
                for asked in self._open:
                    awaited = asked.round.awaited(frame.id)
                    if awaited is not None and node == awaited.request.node:
                        self._take(asked.round, awaited, frame, message)
                        return
                self.dropped["not awaited"] += 1

    def _take(self, round: LayerRequests, part: SubRequest, frame: ResultFrame | ErrorFrame, message: Message) -> None:
        node = part.request.node
        if isinstance(frame, ErrorFrame):
            why = f"node '{node}' refused {_experts(round, part)}: {frame.status.name.lower()}, {frame.message}"
            pause_s = QUARANTINE_S if frame.status is Status.NOT_FINITE else 0.0
            self.health.failed(node, self.clock.monotonic_s(), why, least_pause_s=pause_s)
            self._failed(round, part, why)
            return
        if frame.layer != round.layer or frame.output.shape != (len(part.request.rows), round.hidden.shape[1]):
            self.dropped["wrong shape"] += 1
            return
        if part.doubtful is not None:
            self.dropped["not awaited"] += 1  # repeating itself makes it no more credible
            return
        answer = NodeAnswer(frame.output, part.record(frame, message))
        gain = largest_gain(round.rows(part.request), frame.output)
        if not self._guard.suspects(round.layer, gain):
            self._guard.learn(round.layer, len(frame.output), gain)
        elif part.replacements or self._reroute(round, part):
            part.doubtful = answer
            return
        else:
            log.debug("node '%s' gave %s unusually large values; nobody to ask", node, _experts(round, part))
        round.settle(part, answer)

    def _compare(self, round: LayerRequests) -> None:
        """Who gave an answer that was not believed is quarantined, unless others say the same."""
        for part, others in round.doubtful():
            assert part.doubtful is not None  # noqa: S101 - that is what makes it doubtful
            theirs = np.zeros_like(round.hidden)
            for other in others:
                if other.answer is not None:
                    theirs[other.request.rows] += other.answer.output
            rows, node = part.request.rows, part.request.node
            if agree(part.doubtful.output, theirs[rows]):
                gain = largest_gain(round.rows(part.request), part.doubtful.output)
                self._guard.learn(round.layer, len(rows), gain)
                continue
            self.dropped["absurd"] += 1
            why = f"node '{node}' answered {_experts(round, part)} with absurdly large values"
            self.health.failed(node, self.clock.monotonic_s(), why, least_pause_s=QUARANTINE_S)

    def _overdue(self, round: LayerRequests, part: SubRequest) -> None:
        """Ask others; where there are none, wait for as long as the last holder is given."""
        assert part.sent is not None  # noqa: S101 - only what was sent can be overdue
        node = part.request.node
        waited_s = (self.clock.perf_ns() - part.sent.sent_ns) / 1e9
        why = f"node '{node}' did not answer {_experts(round, part)} within {waited_s:.2f} s"
        if self._reroute(round, part):
            self.health.failed(node, self.clock.monotonic_s(), why)
            return
        if self._last_holder_s < self._timeout_s and waited_s >= self._last_holder_s:
            self.health.failed(node, self.clock.monotonic_s(), why)
            self._failed(round, part, why)
        left_s = max(0.0, self._last_holder_s - waited_s) if self._last_holder_s < self._timeout_s else float("inf")
        part.sent = part.sent._replace(overdue_s=self.clock.monotonic_s() + left_s)

    def _failed(self, round: LayerRequests, part: SubRequest, why: str) -> None:
        """There will be no answer from this node."""
        part.failed = why
        if not part.replacements and not self._reroute(round, part):
            round.lost = round.lost or why

    def _reroute(self, round: LayerRequests, part: SubRequest) -> bool:
        experts = [s.expert for s in part.request.experts]
        holder = self._holders.others(round.layer, experts, part.asked) if round.reroute else None
        if holder is None:
            return False
        gate = part.request.gate(len(round.hidden), self.fleet.dims.experts)
        self._send(round, part.reroute(plan_requests(gate, holder, max_tokens=self._sender.max_tokens)))
        return True


def _experts(round: LayerRequests, part: SubRequest) -> str:
    return format_selector(ExpertId(round.layer, s.expert) for s in part.request.experts)
