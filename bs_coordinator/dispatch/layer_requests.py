"""One layer's requests to the nodes and what became of each: data and queries. `state_machine` decides what happens.

A layer is a list of sub-requests, one or more per node. A sub-request that is rerouted has replacements, which are
sub-requests themselves, so that the whole is a forest. A row of a chosen expert is answered by exactly one sub-request:
the topmost one whose own answer counts.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

import numpy as np

from bs_coordinator.dispatch.plan_requests import Request
from bs_coordinator.engine.step_records import DispatchRecord
from bs_coordinator.errors import AnswerError, DispatchError
from bs_coordinator.links import LinkSample
from wire.errors import BrokerError
from wire.experts import UnitId, format_selector
from wire.frames import RequestId, ResultFrame
from wire.tensors import Array
from wire.transport import Message


class State(Enum):
    """Where a sub-request is.

    SENT: its node's answer is awaited.
    REROUTED: its node is overdue and replacements were sent. Its own answer is still awaited: whichever is complete
        first counts.
    SUSPECT: its node answered with values too large to be believed. The replacements' answers count, and decide
        whether the node is at fault.
    FAILED: its node will not answer. The replacements' answers count; without replacements the layer has failed.
    ANSWERED: its node's answer counts.
    """

    SENT = "sent"
    REROUTED = "rerouted"
    SUSPECT = "suspect"
    FAILED = "failed"
    ANSWERED = "answered"


class Sent(NamedTuple):
    """When and how a request was sent.

    Attributes:
        sent_ns: `Clock.perf_ns` just before it was handed to the network.
        sent_unix_ns: the same moment by the wall clock.
        down_bytes: length of its frame.
        rows: hidden states, counted once for each expert that they go to.
        predicted_ns: round trip that was expected.
        ahead: requests that its node had not answered by then.
        overdue_s: time, in seconds by `Clock.perf_ns`, at which it is rerouted.
        waiting_since_s: since when its node might have answered, in seconds by `Clock.perf_ns`: since it was sent,
            without times at which no node was heard.
        give_up_s: how long it may wait if no other node holds its experts.
    """

    id: RequestId
    sent_ns: int
    sent_unix_ns: int
    down_bytes: int
    rows: int
    predicted_ns: int
    ahead: int
    overdue_s: float
    waiting_since_s: float
    give_up_s: float


class NodeAnswer(NamedTuple):
    """What a node computed, float32 [rows, hidden], and what that took.

    Attributes:
        excess: how large it is relative to the manifest's probes, see `OutputGuard.excess`; 0 if that is not known.
    """

    output: Array
    record: DispatchRecord
    excess: float = 0.0


@dataclass(slots=True, eq=False)
class SubRequest:
    """One request to one node.

    Attributes:
        tried: nodes that were sent these rows so far, this request's included.
        sent: how it was sent; None until then.
        answer: its node's answer, in the states SUSPECT and ANSWERED only.
        replacements: requests to other nodes for the same rows and experts, in the states REROUTED, SUSPECT and FAILED.
        not_finite: in the state FAILED: what its node said if it found no finite output; empty otherwise.
    """

    request: Request
    tried: frozenset[str]
    state: State = State.SENT
    sent: Sent | None = None
    answer: NodeAnswer | None = None
    replacements: list["SubRequest"] = field(default_factory=list)
    not_finite: str = ""

    @property
    def node(self) -> str:
        """The node it is sent to."""
        return self.request.node

    @property
    def in_flight(self) -> bool:
        """Whether its own node's answer would count."""
        return self.state is State.SENT or self.state is State.REROUTED

    @property
    def done(self) -> bool:
        """Whether all its rows are answered, by its node or by replacements."""
        if self.state is State.ANSWERED:
            return True
        return bool(self.replacements) and all(replacement.done for replacement in self.replacements)

    def answers(self) -> Iterator[tuple["SubRequest", NodeAnswer]]:
        """The answers that count for its rows, in the order of sending."""
        if self.state is State.ANSWERED:
            assert self.answer is not None  # noqa: S101 - that is what the state means
            yield self, self.answer
        else:
            for replacement in self.replacements:
                yield from replacement.answers()

    def record(self, frame: ResultFrame, message: Message, *, begun_ns: int) -> DispatchRecord:
        """The log's record of this request, given its answer and when its layer was begun (`LayerRequests`)."""
        request, sent = self.request, self.sent
        assert sent is not None  # noqa: S101 - an answer has come
        return DispatchRecord(
            node=request.node,
            experts=tuple(s.expert for s in request.experts),
            tokens=len(request.rows),
            sent_unix_ns=sent.sent_unix_ns,
            round_trip_ns=message.arrived_ns - sent.sent_ns,
            durations=frame.durations,
            down_bytes=sent.down_bytes,
            up_bytes=len(message.payload),
            predicted_ns=sent.predicted_ns,
            planned_ns=sent.sent_ns - begun_ns,
        )

    def sample(self, record: DispatchRecord) -> LinkSample:
        """The link estimator's sample of this request, given its record."""
        assert self.sent is not None  # noqa: S101 - an answer has come
        return LinkSample(
            time_s=(self.sent.sent_ns + record.round_trip_ns) / 1e9,
            node=record.node,
            down_bytes=record.down_bytes,
            up_bytes=record.up_bytes,
            round_trip_s=record.round_trip_ns / 1e9,
            node_s=record.durations.total_ns / 1e9,
            experts=len(record.experts),
            rows=self.sent.rows,
            load_s=record.durations.load_ns / 1e9,
            queued=self.sent.ahead > 0,
        )


class LayerLimits(NamedTuple):
    """What bounds a layer's requests.

    Attributes:
        timeout_s: how long a layer may wait for its nodes.
        last_holder_s: how long an overdue request waits if no other node holds its experts; at most `timeout_s`.
        max_tokens: rows of one request.
    """

    timeout_s: float
    last_holder_s: float
    max_tokens: int


class LayerRequests:
    """All requests of one layer.

    Attributes:
        layer: index of the layer.
        hidden: float32 [tokens, hidden], the experts' input.
        gate: float32 [tokens, units], zero where an expert is not chosen; units are experts, or their slices.
        slices: into which each expert is cut.
        began_ns: `Clock.perf_ns` when the layer was begun.
        only_node: the one node that may be asked; None for any holder.
        planned: holders are chosen, and the sub-requests are those that count.
        sub_requests: one or more per node, in the order of sending.
        suspects: those that ever were in the state SUSPECT, or whose nodes found no finite output.
        planned_s: time, in seconds by `Clock.perf_ns`, at which it was planned.
        deadline_s: time, in seconds by `Clock.perf_ns`, at which the layer fails.
        error: why the layer has failed; None while it has not.
        connection_losses: how often the connection was lost while the layer was under way.
    """

    def __init__(
        self,
        layer: int,
        hidden: Array,
        gate: Array,
        limits: LayerLimits,
        *,
        slices: int = 1,
        began_ns: int = 0,
        only_node: str | None = None,
    ) -> None:
        """Nothing is planned yet."""
        self.layer = layer
        self.hidden = hidden
        self.gate = gate
        self.limits = limits
        self.slices = slices
        self.began_ns = began_ns
        self.only_node = only_node
        self.planned = False
        self.sub_requests: list[SubRequest] = []
        self.suspects: list[SubRequest] = []
        self.planned_s = 0.0
        self.deadline_s = math.inf
        self.error: DispatchError | BrokerError | AnswerError | None = None
        self.connection_losses = 0
        self._by_id: dict[RequestId, SubRequest] = {}

    @property
    def done(self) -> bool:
        """Whether every row of every chosen expert is answered."""
        return self.planned and all(sub.done for sub in self.sub_requests)

    def clear(self) -> None:
        """Forget all requests: answers to them will not come, or not count."""
        self.planned = False
        self.sub_requests = []
        self.suspects = []
        self._by_id = {}

    def postpone(self, began_s: float, ended_s: float) -> None:
        """Add to all deadlines a time in which the base station itself stood still, by `Clock.perf_ns`."""
        self.deadline_s += max(0.0, ended_s - max(began_s, self.planned_s))
        for sub in self._by_id.values():
            if sub.sent is not None:
                lost_s = max(0.0, ended_s - max(began_s, sub.sent.sent_ns / 1e9))
                sub.sent = sub.sent._replace(
                    overdue_s=sub.sent.overdue_s + lost_s, waiting_since_s=sub.sent.waiting_since_s + lost_s
                )

    def mark_sent(self, sub: SubRequest, sent: Sent) -> None:
        """Record that `sub` is on its way."""
        sub.sent = sent
        self._by_id[sent.id] = sub

    def find(self, id: RequestId) -> SubRequest | None:
        """The sub-request with this id; None if it is not this layer's."""
        return self._by_id.get(id)

    def rows(self, request: Request) -> Array:
        """The hidden states of a request, float32 [rows, hidden]."""
        # Rows ascend, so that as many as there are must be all of them.
        return self.hidden if len(request.rows) == len(self.hidden) else self.hidden[request.rows]

    def open(self) -> list[SubRequest]:
        """Sub-requests whose rows are not all answered, in any state but ANSWERED, parents before replacements."""
        return list(_open(self.sub_requests))

    def in_flight(self) -> list[SubRequest]:
        """Open sub-requests whose own node's answer would count."""
        return [sub for sub in _open(self.sub_requests) if sub.in_flight]

    def unanswered(self, node: str) -> int:
        """Requests that `node` is still working on, as far as this layer knows."""
        return sum(sub.in_flight and sub.node == node for sub in self._by_id.values())

    def next_due_s(self) -> float:
        """When time itself will be an event: the deadline or the next overdue sub-request, in seconds by
        `Clock.perf_ns`; inf if the layer is done or has failed."""
        if self.error is not None:
            return math.inf
        due_s, done = self.deadline_s, self.planned
        for sub in _open(self.sub_requests):
            done = False
            if sub.state is State.SENT and sub.sent is not None and sub.sent.overdue_s < due_s:
                due_s = sub.sent.overdue_s
        return math.inf if done else due_s

    def answers(self) -> list[tuple[SubRequest, NodeAnswer]]:
        """The answers that count, in the order of sending."""
        return [found for sub in self.sub_requests for found in sub.answers()]

    def output(self, answers: Iterable[tuple[SubRequest, NodeAnswer]]) -> Array:
        """The sum of the answers that count, float32 [tokens, hidden]."""
        output = np.zeros(self.hidden.shape, np.float32)
        # Added in the order of sending, not of arrival: floating-point sums depend on it.
        for sub, answer in answers:
            if len(answer.output) == len(output):
                output += answer.output
            else:
                output[sub.request.rows] += answer.output
        return output

    def describe(self, sub: SubRequest) -> str:
        """The experts of a sub-request as an operator selects them, such as "L0:E2-3"."""
        return format_selector((UnitId(self.layer, s.expert) for s in sub.request.experts), self.slices)


def _open(sub_requests: Sequence[SubRequest]) -> Iterator[SubRequest]:
    for sub in sub_requests:
        if not sub.done:
            yield sub
            yield from _open(sub.replacements)
