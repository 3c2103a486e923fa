"""One layer's requests until every chosen expert has answered for every row once. Pure: times come with the events.

A request that fails or takes too long is handed on to other holders of its experts; whichever answers first counts,
the first node or all of those that took over. What comes later is no longer awaited.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from bs_coordinator.dispatch.plan_requests import Request
from bs_coordinator.engine.step_records import DispatchRecord
from bs_coordinator.links import LinkSample
from wire.frames import RequestId, ResultFrame
from wire.tensors import Array
from wire.transport import Message

if TYPE_CHECKING:
    from bs_coordinator.resident import Computed


class Sent(NamedTuple):
    """When and how a request went out.

    Attributes:
        ahead: requests that its node had not answered by then.
        overdue_s: time (monotonic) past which others are asked.
    """

    id: RequestId
    sent_ns: int
    sent_unix_ns: int
    down_bytes: int
    predicted_ns: int
    ahead: int
    overdue_s: float


class NodeAnswer(NamedTuple):
    """What came back."""

    output: Array
    record: DispatchRecord


@dataclass(slots=True, eq=False)
class SubRequest:
    """A request and what became of it.

    Attributes:
        asked: nodes that were asked for these rows, this request's included.
        doubtful: an answer that was too large to be believed; the replacements' counts, and is compared with it.
        failed: why its node will not answer any more, else empty.
        replacements: the requests that took over.
        here: its result, where the base station computes it itself.
    """

    request: Request
    asked: frozenset[str]
    sent: Sent | None = None
    answer: NodeAnswer | None = None
    doubtful: NodeAnswer | None = None
    failed: str = ""
    replacements: list["SubRequest"] = field(default_factory=list)
    here: "Future[Computed] | None" = None

    @property
    def done(self) -> bool:
        """Whether its rows' answers are all there."""
        return self.answer is not None or (
            bool(self.replacements) and all(replacement.done for replacement in self.replacements)
        )

    def record(self, frame: ResultFrame, message: Message) -> DispatchRecord:
        """What its answer took."""
        request, sent = self.request, self.sent
        assert sent is not None  # noqa: S101 - its answer was awaited
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
        )

    def sample(self, record: DispatchRecord) -> LinkSample:
        """What its answer says of the link and the node."""
        assert self.sent is not None  # noqa: S101 - its answer was awaited
        return LinkSample(
            time_s=(self.sent.sent_ns + record.round_trip_ns) / 1e9,
            node=record.node,
            down_bytes=record.down_bytes,
            up_bytes=record.up_bytes,
            round_trip_s=record.round_trip_ns / 1e9,
            node_s=record.durations.total_ns / 1e9,
            experts=len(record.experts),
            rows=sum(len(s.tokens) for s in self.request.experts),
            load_s=record.durations.load_ns / 1e9,
            queued=self.sent.ahead > 0,
        )

    def reroute(self, requests: Sequence[Request]) -> list["SubRequest"]:
        """Let others take over."""
        self.replacements = [SubRequest(request, self.asked | {request.node}) for request in requests]
        return self.replacements

    def answered(self) -> Iterator["SubRequest"]:
        """The parts whose answers add up to this one's, in the order of asking."""
        if self.answer is not None:
            yield self
        else:
            for replacement in self.replacements:
                yield from replacement.answered()


class LayerRequests:
    """All of a layer's requests.

    Attributes:
        hidden: float32 [tokens, hidden], what the experts are applied to.
        reroute: whether others may take over.
        deadline_s: time (monotonic) past which it is given up.
        lost: what will not be answered by anybody any more, else empty.
    """

    def __init__(
        self, layer: int, hidden: Array, requests: Sequence[Request], *, reroute: bool, deadline_s: float
    ) -> None:
        self.layer = layer
        self.hidden = hidden
        self.reroute = reroute
        self.deadline_s = deadline_s
        self.lost = ""
        self.parts = [SubRequest(request, frozenset([request.node])) for request in requests]
        self._awaited: dict[RequestId, SubRequest] = {}

    @property
    def done(self) -> bool:
        """Whether nothing is missing."""
        return all(part.done for part in self.parts)

    def rows(self, request: Request) -> Array:
        """The hidden states of a request, float32 [rows, hidden]."""
        # Rows ascend: all of them are the whole.
        return self.hidden if len(request.rows) == len(self.hidden) else self.hidden[request.rows]

    def sent(self, part: SubRequest, sent: Sent) -> None:
        """`part` is on its way; from now on its answer is awaited."""
        part.sent = sent
        self._awaited[sent.id] = part

    def awaited(self, id: RequestId) -> SubRequest | None:
        """The part that an answer with this id belongs to, if it still counts."""
        return self._awaited.get(id)

    def settle(self, part: SubRequest, answer: NodeAnswer) -> None:
        """The first valid answer; neither another one nor the replacements' count from now on."""
        part.answer = answer
        self._awaited = {id: other for id, other in self._awaited.items() if other is not part}

    def unanswered(self, node: str) -> int:
        """Requests that a node has not answered yet."""
        return sum(part.request.node == node and part.answer is None for part in self._awaited.values())

    def doubtful(self) -> list[tuple[SubRequest, list[SubRequest]]]:
        """Parts with an answer that was not believed, each with the parts that answered instead."""
        found = []
        waiting = list(self.parts)
        while waiting:
            part = waiting.pop()
            waiting += part.replacements
            if part.doubtful is not None:
                found.append((part, list(part.answered())))
        return found

    def open(self) -> list[SubRequest]:
        """Parts whose answer is awaited and needed: their rows are not done."""
        return list(self._open(self.parts))

    def outstanding(self) -> list[SubRequest]:
        """Open parts that nobody took over: what the layer is waiting for."""
        return [part for part in self.open() if not part.replacements and not part.failed]

    def overdue(self, now_s: float) -> list[SubRequest]:
        """Open parts that others should be asked for by now, and which nobody took over yet."""
        return [p for p in self.open() if p.sent and not p.replacements and not p.failed and now_s >= p.sent.overdue_s]

    def next_overdue_s(self) -> float:
        """When the next open part will be overdue."""
        times = (p.sent.overdue_s for p in self.open() if p.sent and not p.replacements and not p.failed)
        return min(times, default=float("inf"))

    def _open(self, parts: Sequence[SubRequest]) -> Iterator[SubRequest]:
        for part in parts:
            if not part.done:
                yield part
                yield from self._open(part.replacements)
