"""The base station's own experts as one more node to ask, with neither frames nor a link.

Which experts to keep, and computing them, is for an implementation of `LocalExperts` (`bs_coordinator.resident`).
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from typing import NamedTuple, Protocol

import numpy as np

from bs_coordinator.dispatch.holders import Holders
from bs_coordinator.dispatch.layer_requests import LayerRequests, NodeAnswer, Sent, State, SubRequest
from bs_coordinator.dispatch.output_guard import largest_gain
from bs_coordinator.dispatch.state_machine import AnswerReceived, LocalFailed, NotFiniteReceived
from bs_coordinator.engine.step_records import DispatchRecord
from bs_coordinator.links import LinkMonitor
from bs_coordinator.nodes.registry import LOCAL_NODE, NodeRegistry
from bs_coordinator.selection.forecast import Float
from common.clock import Clock
from wire.experts import UnitId
from wire.frames import ExpertRows, NodeDurations, RequestId
from wire.tensors import Array

_NEVER_S = float("inf")


class Computed(NamedTuple):
    """The result of a request to local experts.

    Attributes:
        output: float32 [rows, hidden], Σ over its experts of gate weight × expert output.
        queue_ns: from the request to the start of its computation.
        compute_ns: its computation.
        done_ns: `Clock.perf_ns` at its end.
    """

    output: Array
    queue_ns: int
    compute_ns: int
    done_ns: int


class LocalExperts(Protocol):
    """Experts that the base station itself keeps and computes, in threads of their own."""

    def observe(self, layer: int, gate: Array) -> None:
        """Take in which experts a layer's tokens are sent to, from gate weights float32 [tokens, experts]."""

    def submit(self, layer: int, hidden: Array, experts: Sequence[ExpertRows]) -> "Future[Computed]":
        """Start to compute a request; `hidden`, float32 [rows, hidden], must not change meanwhile."""

    def fill(self, remote_s: Float, local_s: float) -> "Future[frozenset[UnitId]]":
        """Choose and load the first experts, and give those that are loaded, each with all its slices.

        Args:
            remote_s: float64 [layers, experts], predicted seconds for one hidden state to an expert's fastest node and
                back; inf where no node holds it.
            local_s: predicted seconds for one hidden state through a local expert.
        """

    def changes(self) -> frozenset[UnitId] | None:
        """The experts that may be asked from now on; None if they are the same as before. Cheap."""

    def review_is_due(self) -> bool:
        """Whether the choice of experts should be made again."""

    def review(self, remote_s: Float, local_s: float) -> None:
        """Make the choice again and exchange experts in the background. Arguments as of `fill`."""


class LocalNode:
    """Requests to local experts, and keeping the registry informed of which there are."""

    def __init__(
        self, experts: LocalExperts, *, links: LinkMonitor, registry: NodeRegistry, holders: Holders, clock: Clock
    ) -> None:
        self._experts = experts
        self._links = links
        self._registry = registry
        self._holders = holders
        self._clock = clock
        self._under_way: dict[LayerRequests, list[tuple[SubRequest, Future[Computed]]]] = {}

    def observe(self, layer: int, gate: Array) -> None:
        """Count a layer's choice of experts, float32 [tokens, experts], and `tend` the local ones."""
        self._experts.observe(layer, gate)
        self.tend()

    def fill(self, pump: Callable[[float], None]) -> None:
        """Load the experts that are worth keeping, by their traffic so far and by which nodes are online now.

        Args:
            pump: keeps the connection to the broker alive for that many seconds.

        Raises:
            BundleError, StorageError, ProbeError: an expert can't be loaded.
        """
        filled = self._experts.fill(self._holders.remote_s(), self._holders.local_s())
        while not filled.done():
            pump(0.05)
        self._registry.hold_locally(filled.result())

    def tend(self, *, review: bool = False) -> None:
        """Register an exchange of experts that is complete, and start a review if that is due. Cheap.

        Args:
            review: start one in any case.
        """
        if (ids := self._experts.changes()) is not None:
            self._registry.hold_locally(ids)
        if review or self._experts.review_is_due():
            self._experts.review(self._holders.remote_s(), self._holders.local_s())

    def send(self, layer: LayerRequests, sub: SubRequest, id: RequestId) -> None:
        """Start to compute a sub-request."""
        request = sub.request
        rows = sum(len(s.tokens) for s in request.experts)
        predicted_s = self._links.predict_s(
            LOCAL_NODE, down_bytes=0, up_bytes=0, experts=len(request.experts), rows=rows
        )
        now_ns = self._clock.perf_ns()
        sent = Sent(
            id, now_ns, self._clock.unix_ns(), 0, rows, int(1e9 * predicted_s), 0,
            overdue_s=_NEVER_S, waiting_since_s=now_ns / 1e9, give_up_s=_NEVER_S,
        )  # fmt: skip
        future = self._experts.submit(layer.layer, layer.hidden[request.rows], request.experts)
        layer.mark_sent(sub, sent)
        self._under_way.setdefault(layer, []).append((sub, future))

    def results(self, layer: LayerRequests, timeout_s: float) -> list[AnswerReceived | NotFiniteReceived | LocalFailed]:
        """Sub-requests of a layer that are computed by now.

        Args:
            timeout_s: how long to wait for the first of them if the layer waits for no node.
        """
        under_way = self._under_way.get(layer)
        if not under_way:
            return []
        awaited = [sub for sub in layer.in_flight() if sub.state is State.SENT]
        if all(sub.node == LOCAL_NODE for sub in awaited):
            wait([future for _, future in under_way], timeout_s, return_when="FIRST_COMPLETED")
        done = [(sub, future) for sub, future in under_way if future.done()]
        self._under_way[layer] = [(sub, future) for sub, future in under_way if not future.done()]
        return [_event(layer, sub, future) for sub, future in done]

    def forget(self, layer: LayerRequests) -> None:
        """Drop what is still being computed for a layer."""
        self._under_way.pop(layer, None)


def _event(
    layer: LayerRequests, sub: SubRequest, future: "Future[Computed]"
) -> AnswerReceived | NotFiniteReceived | LocalFailed:
    if error := future.exception():
        return LocalFailed(sub, str(error) or type(error).__name__)
    computed = future.result()
    if not np.isfinite(computed.output).all():
        return NotFiniteReceived(sub, "an expert's output is not finite")
    request, sent = sub.request, sub.sent
    assert sent is not None  # noqa: S101 - it was sent to be computed
    record = DispatchRecord(
        node=LOCAL_NODE,
        experts=tuple(s.expert for s in request.experts),
        tokens=len(request.rows),
        sent_unix_ns=sent.sent_unix_ns,
        round_trip_ns=computed.done_ns - sent.sent_ns,
        durations=NodeDurations(queue_ns=computed.queue_ns, compute_ns=computed.compute_ns),
        down_bytes=0,
        up_bytes=0,
        predicted_ns=sent.predicted_ns,
        planned_ns=sent.sent_ns - layer.began_ns,
    )
    gain = largest_gain(layer.rows(request), computed.output)
    return AnswerReceived(sub, NodeAnswer(computed.output, record), gain, suspicious=False)
