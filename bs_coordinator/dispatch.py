"""Experts on the nodes: a layer's chosen experts become one request per node, their answers one output.

Planning is pure (`plan_requests`); `Dispatcher` does the I/O. Every wait has a deadline, every answer is
matched by session, request and node; whatever else arrives is counted and dropped.
"""

import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bs_coordinator.fleet import Fleet
from bs_coordinator.forecast import LayerForecast
from bs_coordinator.links import LinkMonitor, LinkSample
from bs_coordinator.model import ExpertOutput
from bs_coordinator.records import DispatchRecord
from wire import frames, status, tensors
from wire.errors import DispatchError, FrameError, PlacementError
from wire.experts import ExpertId, format_selector
from wire.frames import ErrorFrame, ExpertSlice, PingFrame, PongFrame, RequestId, ResultFrame, WorkFrame
from wire.status import SocketFacts
from wire.tensors import Array, WireDtype
from wire.topics import Topics
from wire.transport import Message, Transport

_PING_TIMEOUT_S = 10.0


class Request(NamedTuple):
    """What one frame to one node will hold.

    Attributes:
        rows: int64 [n], which rows of the layer's hidden states it carries.
        experts: slices whose token indices count within `rows`.
    """

    node: str
    rows: NDArray[np.int64]
    experts: tuple[ExpertSlice, ...]


def plan_requests(layer: int, gate: Array, fleet: Fleet, *, max_tokens: int) -> list[Request]:
    """Split a layer's work over nodes, and what is too large for one frame into several.

    Args:
        gate: float32 [tokens, experts], zero where an expert is not chosen.

    Raises:
        PlacementError: no node holds a chosen expert.
    """
    experts_of: dict[str, list[int]] = {}
    for expert in np.flatnonzero(gate.any(axis=0)).tolist():
        node = fleet.holder(ExpertId(layer, expert))
        if node is None:
            raise PlacementError(fleet.describe_missing())
        experts_of.setdefault(node, []).append(expert)
    requests = []
    for node, experts in sorted(experts_of.items()):
        rows = np.flatnonzero(gate[:, experts].any(axis=1))
        for start in range(0, len(rows), max_tokens):
            part = rows[start : start + max_tokens]
            requests.append(Request(node, part, tuple(_slices(gate[part], experts))))
    return requests


def _slices(gate: Array, experts: Iterable[int]) -> Iterable[ExpertSlice]:
    for expert in experts:
        tokens = np.flatnonzero(gate[:, expert])
        if len(tokens):
            yield ExpertSlice(expert, tokens.astype(np.uint32), gate[tokens, expert])


class _Pending(NamedTuple):
    request: Request
    order: int
    sent_ns: int
    sent_unix_ns: int
    down_bytes: int
    predicted_ns: int


class _Ping(NamedTuple):
    node: str
    sent_ns: int
    down_bytes: int
    expires: float


class _Answer(NamedTuple):
    output: Array
    record: DispatchRecord
    sample: LinkSample


def _no_facts() -> Mapping[str, SocketFacts]:
    return {}


class Dispatcher:
    """All experts of a model, on the nodes of a fleet (`bs_coordinator.model.Experts`).

    Attributes:
        dropped: messages that were not an awaited answer, by reason.
        links: what is known of the nodes and their links.
    """

    def __init__(
        self,
        transport: Transport,
        topics: Topics,
        fleet: Fleet,
        *,
        dtype: WireDtype,
        timeout_s: float,
        links: LinkMonitor | None = None,
        broker_sockets: Callable[[], Mapping[str, SocketFacts]] = _no_facts,
    ) -> None:
        """Subscribe to status and results.

        Args:
            dtype: how hidden states travel.
            timeout_s: how long one layer may wait for its nodes.
            broker_sockets: gives new facts of the broker's connections to its clients, by the clients' endpoints.
        """
        self.links = links or LinkMonitor()
        self.fleet = fleet
        self.dropped: Counter[str] = Counter()
        self._transport = transport
        self._topics = topics
        self._dtype = dtype
        self._timeout_s = timeout_s
        self._session = secrets.randbits(64)
        self._next_request = 0
        self._broker_sockets = broker_sockets
        self._pings: dict[RequestId, _Ping] = {}
        self._holders: list[NDArray[np.intp]] = []
        self._holder_names: list[str] = []
        transport.subscribe(topics.status("+"), qos=1)
        transport.subscribe(topics.results("+"))

    def apply(self, layer: int, hidden: Array, gate: Array) -> ExpertOutput:
        """Ask the nodes and add up their answers (see `Experts.apply`).

        Raises:
            PlacementError: no node holds a chosen expert.
            DispatchError: a node refused, left, or did not answer in time.
            BrokerError: the connection is lost.
        """
        requests = plan_requests(layer, gate, self.fleet, max_tokens=frames.max_tokens(hidden.shape[1], self._dtype))
        pending = dict(self._send(layer, hidden, request, i) for i, request in enumerate(requests))
        answers = self._collect(layer, hidden.shape[1], pending)
        self.links.observe([answers[i].sample for i in range(len(requests))])
        self.probe()
        output = np.zeros(hidden.shape, np.float32)
        # Added in the order of asking, not of arrival: floating-point sums depend on it.
        for i, request in enumerate(requests):
            output[request.rows] += answers[i].output
        return ExpertOutput(output, tuple(answers[i].record for i in range(len(requests))))

    @property
    def holder_names(self) -> Sequence[str]:
        """The nodes that experts are asked of, in the order of a forecast's nodes."""
        if not self._holders:
            self._index_holders()
        return self._holder_names

    def forecast(self, layer: int) -> LayerForecast:
        """See `Experts.forecast`."""
        if not self._holders:
            self._index_holders()
        dims = self.fleet.dims
        row_bytes = tensors.encoded_bytes(1, dims.hidden, self._dtype)
        return self.links.forecast(
            layer,
            self._holder_names,
            self._holders[layer],
            now_s=time.perf_counter(),
            frame_bytes=(frames.HEADER_BYTES, frames.RESULT_BYTES),
            row_bytes=(row_bytes + frames.ROW_BYTES, row_bytes),
        )

    def probe(self) -> None:
        """Send the probe that is due, if any; its answer is taken in whenever it comes. Cheap when none is."""
        now_s = time.perf_counter()
        for endpoint, facts in self._broker_sockets().items():
            if (node := self.fleet.node_at(endpoint)) is not None:
                self.links.anchor(node, facts, towards_node=True, time_s=now_s)
        probe = self.links.next_probe(self.fleet.nodes, now_s)
        if probe is None:
            return
        for id in [id for id, ping in self._pings.items() if ping.expires < now_s]:
            del self._pings[id]
        id = self._new_id()
        payload = frames.encode(PingFrame(id, bytes(probe.down_bytes), probe.up_bytes))
        self._pings[id] = _Ping(probe.node, time.perf_counter_ns(), len(payload), now_s + _PING_TIMEOUT_S)
        self._transport.publish(self._topics.work(probe.node), payload)

    def measure_links(self, seconds: float) -> None:
        """Probe idle links for a while."""
        deadline = time.monotonic() + seconds
        while (remaining := deadline - time.monotonic()) > 0:
            self.probe()
            self.pump(min(remaining, 0.01))

    def pump(self, timeout_s: float) -> None:
        """Take in status messages while nothing is asked; keeps the connection alive."""
        deadline = time.monotonic() + timeout_s
        while (remaining := deadline - time.monotonic()) > 0:
            message = self._transport.receive(remaining)
            if message:
                self._absorb(message)
                self._answer(message)

    def _new_id(self) -> RequestId:
        id = RequestId(self._session, self._next_request)
        self._next_request += 1
        return id

    def _index_holders(self) -> None:
        """Which node each expert would be asked of; an expert that nobody holds counts as the first node's, and
        asking for it fails with the right words."""
        dims = self.fleet.dims
        holders = [[self.fleet.holder(ExpertId(layer, e)) for e in range(dims.experts)] for layer in range(dims.layers)]
        self._holder_names = sorted({name for row in holders for name in row if name is not None}) or [""]
        index = {name: i for i, name in enumerate(self._holder_names)}
        self._holders = [np.array([index.get(name or "", 0) for name in row], np.intp) for row in holders]

    def _send(self, layer: int, hidden: Array, request: Request, order: int) -> tuple[RequestId, _Pending]:
        id = self._new_id()
        frame = WorkFrame(
            id=id,
            layer=layer,
            deadline_ms=int(self._timeout_s * 1000),
            experts=request.experts,
            hidden=hidden[request.rows],
            dtype=self._dtype,
        )
        payload = frames.encode(frame)
        predicted_s = self.links.predict_s(
            request.node,
            down_bytes=len(payload),
            up_bytes=frames.RESULT_BYTES + tensors.encoded_bytes(len(request.rows), hidden.shape[1], self._dtype),
            experts=len(request.experts),
            rows=sum(len(s.tokens) for s in request.experts),
        )
        predicted_ns = int(1e9 * predicted_s)
        pending = _Pending(request, order, time.perf_counter_ns(), time.time_ns(), len(payload), predicted_ns)
        self._transport.publish(self._topics.work(request.node), payload)
        return id, pending

    def _collect(self, layer: int, hidden_size: int, pending: dict[RequestId, _Pending]) -> dict[int, _Answer]:
        answers: dict[int, _Answer] = {}
        deadline = time.monotonic() + self._timeout_s
        while pending:
            remaining = deadline - time.monotonic()
            message = self._transport.receive(remaining) if remaining > 0 else None
            if message is None:
                late = {p.request.node for p in pending.values()}
                raise DispatchError(
                    f"no answer for layer {layer} from {', '.join(sorted(late))} within {self._timeout_s:g} s"
                    ": is the device overloaded or its link down? (--layer-timeout)"
                )
            gone = self._absorb(message)
            for p in pending.values():
                if p.request.node == gone:
                    raise DispatchError(f"node '{gone}' left while {_experts(layer, p)} was asked of it")
            frame = self._answer(message)
            if frame is None:
                continue
            awaited = pending.get(frame.id)
            if awaited is None or message.topic != self._topics.results(awaited.request.node):
                self.dropped["not awaited"] += 1
                continue
            if isinstance(frame, ErrorFrame):
                raise DispatchError(
                    f"node '{awaited.request.node}' refused {_experts(layer, awaited)}: "
                    f"{frame.status.name.lower()}, {frame.message}"
                )
            if frame.layer != layer or frame.output.shape != (len(awaited.request.rows), hidden_size):
                self.dropped["wrong shape"] += 1
                continue
            del pending[frame.id]
            answers[awaited.order] = _Answer(
                frame.output, _record(awaited, frame, message), _sample(awaited, frame, message)
            )
        return answers

    def _answer(self, message: Message) -> ResultFrame | ErrorFrame | None:
        if self._topics.node_of_result(message.topic) is None:
            return None
        try:
            frame = frames.decode(message.payload)
        except FrameError as error:
            self.dropped[error.reason] += 1
            return None
        if isinstance(frame, ResultFrame | ErrorFrame):
            return frame
        if isinstance(frame, PongFrame):
            self._take_pong(frame, message)
        else:
            self.dropped["kind"] += 1
        return None

    def _take_pong(self, frame: PongFrame, message: Message) -> None:
        ping = self._pings.get(frame.id)
        if ping is None or message.topic != self._topics.results(ping.node):
            self.dropped["not awaited"] += 1
            return
        del self._pings[frame.id]
        sample = LinkSample(
            time_s=message.arrived_ns / 1e9,
            node=ping.node,
            down_bytes=ping.down_bytes,
            up_bytes=len(message.payload),
            round_trip_s=(message.arrived_ns - ping.sent_ns) / 1e9,
            node_s=frame.durations.total_ns / 1e9,
        )
        self.links.observe([sample])

    def _absorb(self, message: Message) -> str | None:
        """Take in a status message; the node's name if it can no longer answer what it was asked."""
        node = self._topics.node_of_status(message.topic)
        if node is None or not message.payload:  # an empty payload clears a retained message
            return None
        try:
            document = status.decode_status(message.payload, node)
        except FrameError as error:
            self.dropped[f"status {error.reason}"] += 1
            return None
        gone = self.fleet.apply(document)
        self._holders = []
        if document.uplink is not None and document.online:
            self.links.anchor(node, document.uplink, towards_node=False, time_s=time.perf_counter())
        return node if gone else None


def _experts(layer: int, pending: _Pending) -> str:
    return format_selector(ExpertId(layer, s.expert) for s in pending.request.experts)


def _record(pending: _Pending, frame: ResultFrame, message: Message) -> DispatchRecord:
    request = pending.request
    return DispatchRecord(
        node=request.node,
        experts=tuple(s.expert for s in request.experts),
        tokens=len(request.rows),
        sent_unix_ns=pending.sent_unix_ns,
        round_trip_ns=message.arrived_ns - pending.sent_ns,
        durations=frame.durations,
        down_bytes=pending.down_bytes,
        up_bytes=len(message.payload),
        predicted_ns=pending.predicted_ns,
    )


def _sample(pending: _Pending, frame: ResultFrame, message: Message) -> LinkSample:
    request = pending.request
    return LinkSample(
        time_s=message.arrived_ns / 1e9,
        node=request.node,
        down_bytes=pending.down_bytes,
        up_bytes=len(message.payload),
        round_trip_s=(message.arrived_ns - pending.sent_ns) / 1e9,
        node_s=frame.durations.total_ns / 1e9,
        experts=len(request.experts),
        rows=sum(len(s.tokens) for s in request.experts),
    )
