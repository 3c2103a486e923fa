"""Sends requests to the nodes: their ids and frames, and how long each answer may take."""

import secrets
from collections.abc import Callable, Iterable
from typing import NamedTuple

from bs_coordinator.dispatch.layer_requests import LayerRequests, Sent, SubRequest
from bs_coordinator.links import LinkMonitor
from common.clock import Clock
from wire import frames
from wire.frame_auth import ClusterKey, FrameAuthenticator
from wire.frames import PingFrame, RequestId, WorkFrame
from wire.tensors import WireDtype
from wire.topics import Topics
from wire.transport import Transport

_OVERDUE_FACTOR = 4.0
_GRACE_S = 0.3
"""A request is overdue after `_OVERDUE_FACTOR` times its predicted time plus this, enough for a retransmission."""
_KNOWN_REQUESTS = 8
"""Requests that a node must have answered before predictions decide when its requests are overdue."""
_FIRST_PATIENCE_S = 2.0
"""How long, plus `_OVERDUE_FACTOR` squared times the predicted time, until a request to a node that is not known yet
goes to another holder as well. Where there is none, the node has the layer's whole time: it may only be slow."""


class Published(NamedTuple):
    """A sub-request that was handed to the network, with `Clock.perf_ns` just before."""

    sub: SubRequest
    id: RequestId
    down_bytes: int
    sent_ns: int


class RequestSender:
    """Everything that is sent to nodes, within one session.

    Attributes:
        transport: the current connection.
        dtype: of hidden states on the wire, of requests and so of answers.
        max_tokens: most rows of one request.
        frame_bytes: length of a request and of an answer without rows.
        row_bytes: what each row adds to a request and to an answer.
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
        boot_id: Callable[[str], str],
        clock: Clock,
    ) -> None:
        """Nothing is sent yet.

        Args:
            hidden: length of a hidden state.
            dtype: of hidden states on the wire.
            timeout_s: how long a layer may wait for its nodes.
            cluster_key: authenticates frames; None for frames without tags.
            boot_id: gives the boot id of a node's last status.
        """
        self.transport = transport
        self.frame_bytes = frames.HEADER_BYTES, frames.RESULT_BYTES
        self._hidden = hidden
        self.use(dtype)
        self._topics = topics
        self._links = links
        self._timeout_s = timeout_s
        self._cluster_key = cluster_key
        self._boot_id = boot_id
        self._clock = clock
        self._session = secrets.randbits(64)
        self._next_request = 0

    def use(self, dtype: WireDtype) -> None:
        """Encode hidden states so from the next request on."""
        row_bytes = dtype.codec.row_bytes(self._hidden)
        self.dtype = dtype
        self.max_tokens = frames.max_tokens(self._hidden, dtype)
        self.row_bytes = row_bytes + frames.ROW_BYTES, row_bytes

    def new_id(self) -> RequestId:
        """The id of a new request."""
        id = RequestId(self._session, self._next_request)
        self._next_request += 1
        return id

    def authenticator(self, node: str) -> FrameAuthenticator | None:
        """Authenticates frames to and from a node; None without a cluster key."""
        return self._cluster_key.authenticator(node, self._boot_id(node)) if self._cluster_key else None

    def send_ping(self, node: str, frame: PingFrame) -> tuple[int, int]:
        """Publish a ping, and give its length in bytes and `Clock.perf_ns` just before.

        Raises:
            BrokerError: the connection is lost.
        """
        payload = frames.encode(frame, authenticator=self.authenticator(node))
        sent_ns = self._clock.perf_ns()
        self.transport.publish(self._topics.work(node), payload)
        return len(payload), sent_ns

    def send(self, layer: LayerRequests, sub_requests: Iterable[SubRequest]) -> list[Published]:
        """Publish sub-requests of a layer; `expect` must follow.

        Raises:
            BrokerError: the connection is lost.
        """
        encoded = []
        for sub in sub_requests:
            request = sub.request
            frame = WorkFrame(
                id=self.new_id(),
                layer=layer.layer,
                deadline_ms=int(self._timeout_s * 1000),
                experts=request.experts,
                hidden=layer.rows(request),
                dtype=self.dtype,
            )
            encoded.append((sub, frame.id, frames.encode(frame, authenticator=self.authenticator(request.node))))
        published = []
        # Together, so that the broker wakes up once. The last request, for which a layer waits, leaves earlier.
        with self.transport.in_one_segment():
            for sub, id, payload in encoded:
                published.append(Published(sub, id, len(payload), self._clock.perf_ns()))
                self.transport.publish(self._topics.work(sub.node), payload)
        return published

    def expect(self, layer: LayerRequests, published: Iterable[Published], unanswered: Callable[[str], int]) -> None:
        """Mark sub-requests as sent, each overdue some time after its predicted answer.

        Args:
            unanswered: gives the number of requests that a node has not answered, of all layers.
        """
        now_ns = self._clock.perf_ns()
        unix_minus_perf_ns = self._clock.unix_ns() - now_ns
        for sub, id, down_bytes, sent_ns in published:
            request = sub.request
            rows = sum(len(s.tokens) for s in request.experts)
            predicted_s = self._links.predict_s(
                request.node,
                down_bytes=down_bytes,
                up_bytes=self.frame_bytes[1] + len(request.rows) * self.row_bytes[1],
                experts=len(request.experts),
                rows=rows,
            )
            ahead = unanswered(request.node)
            requests, most_rows = self._links.experience(request.node)
            known = requests >= _KNOWN_REQUESTS
            patience_s = self._patience_s((1 + ahead) * predicted_s, known=known, usual=rows <= most_rows)
            patience_s += self._links.worst_load_s(request.node, experts=len(request.experts))
            sent = Sent(
                id, sent_ns, unix_minus_perf_ns + sent_ns, down_bytes, rows, int(1e9 * predicted_s), ahead,
                overdue_s=now_ns / 1e9 + patience_s,
                waiting_since_s=sent_ns / 1e9,
                give_up_s=layer.limits.last_holder_s if known else layer.limits.timeout_s,
            )  # fmt: skip
            layer.mark_sent(sub, sent)

    def _patience_s(self, predicted_s: float, *, known: bool, usual: bool) -> float:
        """How long to wait for an answer before other holders are asked.

        Args:
            predicted_s: until the answer.
            known: the node has answered enough requests for predictions.
            usual: the node has answered a request with as many rows before.
        """
        if not known:
            return min(self._timeout_s, _FIRST_PATIENCE_S + _OVERDUE_FACTOR**2 * predicted_s)
        return (_OVERDUE_FACTOR if usual else _OVERDUE_FACTOR**2) * predicted_s + _GRACE_S
