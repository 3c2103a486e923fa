"""Requests on their way to the nodes: their ids and frames, and until when an answer is patiently awaited."""

import secrets
from collections.abc import Callable, Iterable
from typing import NamedTuple

from bs_coordinator.dispatch.layer_requests import LayerRequests, Sent, SubRequest
from bs_coordinator.links import LinkMonitor
from common.clock import Clock
from wire import frames, tensors
from wire.frame_auth import ClusterKey, FrameAuthenticator
from wire.frames import PingFrame, RequestId, WorkFrame
from wire.tensors import WireDtype
from wire.topics import Topics
from wire.transport import Transport

_PATIENCE = 4.0
_GRACE_S = 0.3
"""A request is overdue after `_PATIENCE` times its predicted time and this: enough for a retransmission."""
_FAMILIAR = 8
"""Requests that a node must have answered before its predictions are deadlines."""


class Published(NamedTuple):
    """A part that is on its way."""

    part: SubRequest
    id: RequestId
    down_bytes: int
    sent_ns: int


class RequestSender:
    """What leaves for nodes, all of it within one session.

    Attributes:
        transport: the present connection.
        max_tokens: of one request.
        frame_bytes: of a request and an answer without rows.
        row_bytes: what a row adds to each.
    """

    def __init__(
        self,
        transport: Transport,
        topics: Topics,
        links: LinkMonitor,
        *,
        hidden: int,
        dtype: WireDtype,
        timeout_s: float,
        cluster_key: ClusterKey | None,
        clock: Clock,
    ) -> None:
        """Nothing was sent yet.

        Args:
            hidden: length of a hidden state.
            dtype: how hidden states travel.
            timeout_s: how long a layer may wait for its nodes.
            cluster_key: frames carry tags.
        """
        self.transport = transport
        self.max_tokens = frames.max_tokens(hidden, dtype)
        row_bytes = tensors.encoded_bytes(1, hidden, dtype)
        self.frame_bytes = frames.HEADER_BYTES, frames.RESULT_BYTES
        self.row_bytes = row_bytes + frames.ROW_BYTES, row_bytes
        self._topics = topics
        self._links = links
        self._dtype = dtype
        self._timeout_s = timeout_s
        self._cluster_key = cluster_key
        self._clock = clock
        self._session = secrets.randbits(64)
        self._next_request = 0

    def new_id(self) -> RequestId:
        """For a request that was never sent before."""
        id = RequestId(self._session, self._next_request)
        self._next_request += 1
        return id

    def authenticator(self, node: str) -> FrameAuthenticator | None:
        """What frames to and from a node are tagged with."""
        return self._cluster_key.authenticator(node) if self._cluster_key else None

    def send_ping(self, node: str, frame: PingFrame) -> tuple[int, int]:
        """Publish a ping; its length in bytes and `Clock.perf_ns` just before.

        Raises:
            BrokerError: the connection is lost.
        """
        payload = frames.encode(frame, authenticator=self.authenticator(node))
        sent_ns = self._clock.perf_ns()
        self.transport.publish(self._topics.work(node), payload)
        return len(payload), sent_ns

    def send(self, round: LayerRequests, parts: Iterable[SubRequest]) -> list[Published]:
        """Publish parts of a round, whose answers are then to be awaited.

        Raises:
            BrokerError: the connection is lost.
        """
        published = []
        for part in parts:
            request = part.request
            frame = WorkFrame(
                id=self.new_id(),
                layer=round.layer,
                deadline_ms=int(self._timeout_s * 1000),
                experts=request.experts,
                hidden=round.rows(request),
                dtype=self._dtype,
            )
            payload = frames.encode(frame, authenticator=self.authenticator(request.node))
            published.append(Published(part, frame.id, len(payload), self._clock.perf_ns()))
            self.transport.publish(self._topics.work(request.node), payload)
        return published

    def expect(self, round: LayerRequests, published: Iterable[Published], unanswered: Callable[[str], int]) -> None:
        """Await the answers, each for as long as is predicted and some more.

        Args:
            unanswered: requests that a node has not answered, of all rounds.
        """
        now_s, unix_ns = self._clock.monotonic_s(), self._clock.unix_ns() - self._clock.perf_ns()
        for part, id, down_bytes, sent_ns in published:
            request = part.request
            rows = sum(len(s.tokens) for s in request.experts)
            predicted_s = self._links.predict_s(
                request.node,
                down_bytes=down_bytes,
                up_bytes=self.frame_bytes[1] + len(request.rows) * self.row_bytes[1],
                experts=len(request.experts),
                rows=rows,
            )
            ahead = unanswered(request.node)
            patience_s = self._patience_s(request.node, rows, (1 + ahead) * predicted_s)
            patience_s += self._links.worst_load_s(request.node, experts=len(request.experts))
            round.sent(
                part,
                Sent(id, sent_ns, unix_ns + sent_ns, down_bytes, int(1e9 * predicted_s), ahead, now_s + patience_s),
            )

    def _patience_s(self, node: str, rows: int, predicted_s: float) -> float:
        """How long to wait for an answer before others are asked."""
        requests, most_rows = self._links.experience(node)
        if requests < _FAMILIAR:
            return self._timeout_s
        return (_PATIENCE if rows <= most_rows else _PATIENCE**2) * predicted_s + _GRACE_S
