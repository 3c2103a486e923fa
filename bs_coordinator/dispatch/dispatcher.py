"""Experts on the nodes: a layer's chosen experts become one request per node, and their answers one output.

This module assembles the parts and is the interface to them. `request_loop` owns the loop around the socket,
`state_machine` decides what happens to a request.
"""

import contextlib
import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from bs_coordinator.dispatch.health import Health
from bs_coordinator.dispatch.holders import Holders
from bs_coordinator.dispatch.join_watch import JoinWatch
from bs_coordinator.dispatch.layer_requests import LayerLimits, LayerRequests, NodeAnswer, SubRequest
from bs_coordinator.dispatch.local_node import LocalExperts, LocalNode
from bs_coordinator.dispatch.output_guard import OutputGuard
from bs_coordinator.dispatch.probe_gate import ProbeGate
from bs_coordinator.dispatch.prober import Prober
from bs_coordinator.dispatch.receiver import MessageRouter
from bs_coordinator.dispatch.reconnection import Reconnector
from bs_coordinator.dispatch.request_loop import RequestLoop
from bs_coordinator.dispatch.sender import RequestSender
from bs_coordinator.engine.experts import ExpertOutput, LargestAnswer
from bs_coordinator.errors import AnswerError
from bs_coordinator.links import LinkMonitor
from bs_coordinator.nodes.clock_offsets import ClockSample
from bs_coordinator.nodes.registry import NodeRegistry
from bs_coordinator.nodes.telemetry_inbox import TelemetryInbox
from bs_coordinator.selection.forecast import LayerForecast
from common.clock import SYSTEM_CLOCK, Clock
from wire.errors import BrokerError
from wire.frame_auth import ClusterKey
from wire.status import SocketFacts
from wire.tensors import Array, WireDtype, all_below
from wire.topics import Topics
from wire.transport import Transport

log = logging.getLogger(__name__)

_CLOCK_EVERY_S = 0.05
_PROVE_EVERY_S = 0.5
"""How often to check, while no layer is awaited, whether nodes that are left out are due a ping."""


def _describe_overflow(layer: int, largest: float, dtype: WireDtype) -> str:
    if not math.isfinite(largest):
        return f"the hidden states of layer {layer} are not finite"
    what = f"a value of {largest:.3g} in a hidden state of layer {layer}"
    return f"{what} is too large for {dtype.name.lower()} on the wire: with --wire fp32 larger values fit"


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
            AnswerError: several holders of an expert, or its only one, found no finite output for these inputs.
            BrokerError: the connection is lost and can't be restored in time.
        """
        return self._dispatcher._result(self._layer)

    def cancel(self) -> None:
        """Stop waiting; answers that still come are dropped."""
        self._dispatcher._loop.close(self._layer)


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
        probe_gains: Sequence[float] | None = None,
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
            probe_gains: by layer, the largest gain of the manifest's probes, by which answers are judged
                (`output_guard.probe_gains`); None if there is no manifest, and then each layer's first answer is
                believed.
            clock: what every deadline and duration is read from.
        """
        self.registry = registry
        self.links = links or LinkMonitor()
        self.health = Health()
        self.clock = clock
        self._sender = RequestSender(
            transport, topics, self.links,
            hidden=registry.dims.hidden, dtype=dtype, timeout_s=timeout_s, cluster_key=cluster_key,
            boot_id=registry.boot_id, clock=clock,
        )  # fmt: skip
        self._limits = LayerLimits(
            timeout_s,
            timeout_s if last_holder_s is None else min(last_holder_s, timeout_s),
            self._sender.max_tokens,
        )
        self._join_watch = JoinWatch()
        self._holders = Holders(
            registry,
            self.health,
            self.links,
            message_bytes=self._sender.frame_bytes[0] + self._sender.row_bytes[1],
            last_resort=last_holder_s is None,
        )
        self.local = None
        if local_experts is not None:
            self.local = LocalNode(
                local_experts, links=self.links, registry=registry, holders=self._holders, clock=clock
            )  # fmt: skip
        self._prober = Prober(self.links, self.health, self._sender.send_ping, self._sender.new_id, clock=clock)
        self._probe_gate = ProbeGate(
            self._prober, self.links, registry, broker_sockets=broker_sockets, clock=clock
        )  # fmt: skip
        self._router = MessageRouter(
            topics, registry, self.health, self.links, self._prober, self._sender.authenticator
        )  # fmt: skip
        self._reconnector = Reconnector(
            reconnect, sender=self._sender, router=self._router, registry=registry, pump=self.pump, clock=clock
        )  # fmt: skip
        self._loop = RequestLoop(
            sender=self._sender,
            router=self._router,
            holders=self._holders,
            registry=registry,
            health=self.health,
            local=self.local,
            recover=self._reconnector.recover,
            prober=self._prober,
            guard=OutputGuard(probe_gains or [0.0] * registry.dims.layers),
            clock=clock,
        )
        self._done: list[_Done] = []
        self._lost = ((-1, -1), "")
        self._router.subscribe(transport)

    def begin(self, layer: int, hidden: Array, gate: Array) -> PendingLayer:
        """Send a layer's requests. Several layers may be under way at once.

        Args:
            layer: index of the layer.
            hidden: float32 [tokens, hidden].
            gate: float32 [tokens, experts], zero where an expert is not chosen; or [tokens, units], to ask only some
                slices of experts.

        Raises:
            PlacementError: no node online holds a chosen expert.
            ExpertsLostError: all holders of a chosen expert are left out.
            AnswerError: the hidden states are not finite, or too large for the wire's dtype.
            BrokerError: the connection is lost and can't be restored in time.
        """
        if not all_below(hidden, self._sender.dtype.codec.limit):
            raise AnswerError(_describe_overflow(layer, float(np.abs(hidden).max()), self._sender.dtype))
        if self.local is not None and gate.shape[1] == self.registry.dims.experts:
            self.local.observe(layer, gate)
        return self._begin(self._requests(layer, hidden, gate, self._limits))

    def use_wire(self, dtype: WireDtype) -> None:
        """Encode hidden states so from the next layer on; no layer may be under way. Local experts round as before."""
        self._sender.use(dtype)
        self._limits = self._limits._replace(max_tokens=self._sender.max_tokens)

    def apply(self, layer: int, hidden: Array, gate: Array) -> ExpertOutput:
        """Send a layer's requests, wait for the answers and add them up.

        Raises:
            PlacementError, ExpertsLostError, DispatchError, BrokerError: as of `begin` and `PendingLayer.result`.
        """
        return self.begin(layer, hidden, gate).result()

    def ask(
        self, node: str, layer: int, hidden: Array, gate: Array, *, timeout_s: float | None = None
    ) -> ExpertOutput:  # fmt: skip
        """As `apply`, but send everything to `node`, even if it is left out, and to no other node if it fails.

        Args:
            gate: as of `begin`.
            timeout_s: how long to wait at most, instead of the dispatcher's own limit if that is longer.
        """
        limits = self._limits
        if timeout_s is not None and timeout_s < limits.timeout_s:
            limits = limits._replace(timeout_s=timeout_s, last_holder_s=timeout_s)
        return self._begin(self._requests(layer, hidden, gate, limits, only_node=node)).result()

    @property
    def dropped(self) -> Counter[str]:
        """How many messages were of no use so far, by reason."""
        return Counter(self._router.dropped)

    @property
    def resent(self) -> Counter[str]:
        """How many requests were sent again so far, to other nodes or on a new connection, by reason."""
        return Counter(self._loop.resent)

    @property
    def telemetry(self) -> TelemetryInbox:
        """The nodes' telemetry."""
        return self._router.telemetry

    @property
    def holder_names(self) -> Sequence[str]:
        """The nodes that experts are asked of, in the order of a forecast's nodes."""
        self._holders.refresh(self._now_s())
        return tuple(self._holders.names)

    def assigned(self) -> list[list[str | None]]:
        """The node that each expert, or slice, is asked of now, [layers][units]; None where no node can be asked."""
        self._holders.refresh(self._now_s())
        dims = self.registry.dims
        return [[self._holders.node(layer, unit) for unit in range(dims.units)] for layer in range(dims.layers)]

    def describe_lost(self) -> str:
        """One line for people about experts that can't be asked, because they are missing or all their holders are
        left out; empty if there are none. Cheap while nothing changes."""
        changes = (self.registry.changes, self.health.changes)
        if changes != self._lost[0]:
            missing, unusable = self.registry.missing(), self._holders.unusable()
            line = self.registry.describe_missing() if missing else self._holders.describe_unusable(unusable)
            self._lost = (changes, line)
        return self._lost[1]

    def forecast(self, layer: int) -> LayerForecast:
        """What asking for this layer's experts is predicted to cost now."""
        now_s = self._now_s()
        self._holders.refresh(now_s)
        forecast = self.links.forecast(
            layer,
            self._holders.names,
            self._holders.index(layer),
            available=self._holders.available(layer),
            now_s=now_s,
            frame_bytes=self._sender.frame_bytes,
            row_bytes=self._sender.row_bytes,
        )
        return forecast.of_experts(self.registry.dims.slices)

    def quarantine(self, node: str, why: str) -> None:
        """Leave a node out for minutes, because what it computes is nonsense."""
        self.health.failed(node, self._now_s(), why, quarantine=True)

    def acquit(self, node: str) -> None:
        """End a node's quarantine, because it turned out not to be at fault."""
        self.health.acquitted(node)

    def probe(self) -> None:
        """Send the link probes that are due, if any. Their answers are taken in whenever they come.

        Raises:
            BrokerError: the connection is lost.
        """
        if self._probe_gate.due(working=bool(self._loop.open)):
            self._learn()
            self._probe_gate.probe(self._loop.open)

    def measure_links(self, seconds: float) -> None:
        """Probe idle links for this long.

        Also links that were known well are pinged all the time: they may have changed while they were idle, and the
        budget of probes may be spent.
        """
        until_s = self._now_s() + seconds
        while (remaining_s := until_s - self._now_s()) > 0:
            self._prober.ping(self.registry.nodes, self._now_s())
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
            self._loop.receive(min(remaining_s, _PROVE_EVERY_S))

    def recover(self, lost: BrokerError) -> None:
        """Connect again after the connection was lost.

        Raises:
            BrokerError: there is no way to reconnect, or the broker stays away.
        """
        self._reconnector.recover(lost)

    @property
    def reconnecting(self) -> bool:
        """Whether a lost connection is being replaced."""
        return self._reconnector.active

    def no_reconnecting(self) -> contextlib.AbstractContextManager[None]:
        """Entered from any thread: meanwhile a lost connection is an error, also one that is being replaced."""
        return self._reconnector.given_up()

    def close(self) -> None:
        """Close the connection to the broker."""
        self._sender.transport.close()

    def _now_s(self) -> float:
        # The clock of `Message.arrived_ns`, which links are timed by.
        return self.clock.perf_ns() / 1e9

    def _requests(
        self, layer: int, hidden: Array, gate: Array, limits: LayerLimits, *, only_node: str | None = None
    ) -> LayerRequests:
        """A layer with nothing planned yet; where experts are cut into slices, each is asked with all of them."""
        began_ns, dims = self.clock.perf_ns(), self.registry.dims
        if dims.slices > 1 and gate.shape[1] == dims.experts:
            gate = gate.repeat(dims.slices, axis=1)
        return LayerRequests(layer, hidden, gate, limits, slices=dims.slices, began_ns=began_ns, only_node=only_node)

    def _begin(self, layer: LayerRequests) -> PendingLayer:
        self._loop.begin(layer)
        # Done while the nodes compute, because it would delay the next layer. Links of nodes that have no request are
        # idle now, and answers to probes are read at once.
        self._learn()
        self._probe_meanwhile()
        return PendingLayer(self, layer)

    def _result(self, layer: LayerRequests) -> ExpertOutput:
        self._loop.finish(layer)
        answers = layer.answers()
        self._done.append(_Done(layer, answers, self.clock.perf_ns() - layer.began_ns))
        largest = max(
            (LargestAnswer(sub.node, answer.excess) for sub, answer in answers if answer.excess),
            key=lambda found: found.excess,
            default=None,
        )
        records = tuple(answer.record.of_experts(layer.slices) for _, answer in answers)
        output = ExpertOutput(layer.output(answers), records, largest)
        if self.links.shared_air or {sub.node for sub in layer.sub_requests}.issuperset(self.registry.nodes):
            self._probe_meanwhile()
        return output

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
        if self._probe_gate.due(working=bool(self._loop.open)):
            with contextlib.suppress(BrokerError):
                self.probe()
