"""The resident experts as one more holder of a layer's requests."""

from concurrent.futures import wait

import numpy as np

from bs_coordinator.dispatch.layer_requests import LayerRequests, NodeAnswer, Sent, SubRequest
from bs_coordinator.engine.step_records import DispatchRecord
from bs_coordinator.links import LinkMonitor
from bs_coordinator.nodes.registry import LOCAL_NODE
from bs_coordinator.resident.experts import Computed, ResidentExperts
from common.clock import SYSTEM_CLOCK, Clock
from wire.frames import NodeDurations, RequestId

_NEVER_S = float("inf")


class ResidentHolder:
    """Asked like a node, with neither frames nor a link."""

    def __init__(self, experts: ResidentExperts, links: LinkMonitor, *, clock: Clock = SYSTEM_CLOCK) -> None:
        self.experts = experts
        self._links = links
        self._clock = clock

    def ask(self, round: LayerRequests, part: SubRequest, id: RequestId) -> None:
        """Begin to compute a request."""
        request = part.request
        rows = sum(len(s.tokens) for s in request.experts)
        predicted_s = self._links.predict_s(
            LOCAL_NODE, down_bytes=0, up_bytes=0, experts=len(request.experts), rows=rows
        )
        sent = Sent(id, self._clock.perf_ns(), self._clock.unix_ns(), 0, int(1e9 * predicted_s), 0, _NEVER_S)
        part.here = self.experts.submit(round.layer, round.hidden[request.rows], request.experts)
        round.sent(part, sent)

    def answered(self, round: LayerRequests, timeout_s: float) -> list[tuple[SubRequest, NodeAnswer | str]]:
        """Requests that are done, each with its answer or why there is none.

        Waits for one only where the layer waits for nothing else.
        """
        outstanding = round.outstanding()
        asked = [(part, part.here) for part in outstanding if part.here is not None]
        if asked and len(asked) == len(outstanding):
            wait([future for _, future in asked], timeout_s, return_when="FIRST_COMPLETED")
        results: list[tuple[SubRequest, NodeAnswer | str]] = []
        for part, future in asked:
            if not future.done():
                continue
            error = future.exception()
            results.append((part, str(error) or type(error).__name__ if error else _answer(part, future.result())))
        return results


def _answer(part: SubRequest, computed: Computed) -> NodeAnswer | str:
    request, sent = part.request, part.sent
    assert sent is not None  # noqa: S101 - it was asked
    if not np.isfinite(computed.output).all():
        return "an output was not finite"
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
    )
    return NodeAnswer(computed.output, record)
