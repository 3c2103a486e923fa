"""Where a layer's time goes, hop by hop: records of decode steps together with the packets that passed. Pure.

The hops of a layer are differences of consecutive times, so they add up to the layer's time.
"""

import bisect
from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

from bs_coordinator.engine.step_records import LayerRecord
from testbed.bench.floor import Alone, FloorLink
from testbed.bench.packets import Sighting
from wire.frames import Frame, RequestId, ResultFrame, WorkFrame

LOOPBACK, BROKER, NODE = "base station to broker", "broker to nodes", "node"
"""Where packets are seen: between base station and broker, at the broker's end of the links, and at their other end."""

TRUNK, COMPUTE = "trunk and choosing", "node: computes"
LINK_DOWN, LINK_UP = "link down, as configured", "link up, as configured"


class Hops(NamedTuple):
    """A layer of a decode step.

    Attributes:
        ms: time of each hop, in their order; they add up to the layer's time.
        alone_ms: the same for the hops that the floor consists of.
    """

    ms: dict[str, float]
    alone_ms: dict[str, float]


class Passages:
    """When each frame passed each place."""

    def __init__(self, sightings: Iterable[Sighting]) -> None:
        self._at_ns: dict[tuple[str, type[Frame], RequestId], int] = {}
        self._requests: dict[tuple[str, int], list[tuple[int, RequestId]]] = defaultdict(list)
        for where, at_ns, topic, frame in sightings:
            self._at_ns.setdefault((where, type(frame), frame.id), at_ns)
            if where == LOOPBACK and isinstance(frame, WorkFrame):
                node = topic.split("/")[-2]
                self._requests[node, frame.layer].append((at_ns, frame.id))
        for requests in self._requests.values():
            requests.sort()

    def hops(self, layer: LayerRecord, link: FloorLink, alone: Alone, *, layers: int) -> Hops | None:
        """The hops of a layer's slowest request; None if not all of its packets were seen.

        Args:
            link: as configured.
            alone: the parts alone.
            layers: that the trunk has.
        """
        record = layer.critical
        if record is None:
            return None
        sent_ns = record.sent_unix_ns
        id = self._nearest(record.node, layer.layer, sent_ns)
        if id is None:
            return None
        down = [self._at_ns.get((where, WorkFrame, id)) for where in (LOOPBACK, BROKER, NODE)]
        up = [self._at_ns.get((where, ResultFrame, id)) for where in (NODE, BROKER, LOOPBACK)]
        seen = [at_ns for at_ns in (*down, *up) if at_ns is not None]
        if len(seen) < 6 or abs(seen[0] - sent_ns) > record.round_trip_ns:
            return None
        written, broker_sent, node_got, node_wrote, broker_got, back = seen
        down_ns, up_ns = (
            round(1e6 * link.one_way_ms(frame_bytes)) for frame_bytes in (record.down_bytes, record.up_bytes)
        )
        durations = record.durations
        ns = {
            TRUNK: layer.trunk_ns,
            "base station: plans and encodes": record.planned_ns,
            "base station: writes": written - sent_ns,
            "broker, down": broker_sent - written,
            LINK_DOWN: down_ns,
            "relay and kernels, down": node_got - broker_sent - down_ns,
            "node: wakes up and reads, writes": node_wrote - node_got - durations.total_ns,
            "node: queue": durations.queue_ns,
            "node: decodes": durations.decode_ns,
            COMPUTE: durations.compute_ns + durations.load_ns,
            "node: encodes": durations.encode_ns,
            LINK_UP: up_ns,
            "relay and kernels, up": broker_got - node_wrote - up_ns,
            "broker, up": back - broker_got,
            "base station: wakes up and reads": sent_ns + record.round_trip_ns - back,
            "base station: decodes and adds up": layer.dispatch_ns - record.planned_ns - record.round_trip_ns,
        }
        alone_ms = {
            TRUNK: alone.trunk_ms / layers,
            LINK_DOWN: down_ns / 1e6,
            COMPUTE: alone.compute_ms(len(record.experts)),
            LINK_UP: up_ns / 1e6,
        }
        return Hops({hop: some / 1e6 for hop, some in ns.items()}, alone_ms)

    def _nearest(self, node: str, layer: int, sent_ns: int) -> RequestId | None:
        """The request that passed loopback nearest to when it was sent: records have no ids. A layer's next request
        is a token later."""
        requests = self._requests.get((node, layer))
        if not requests:
            return None
        place = bisect.bisect(requests, sent_ns, key=lambda request: request[0])
        return min(requests[max(0, place - 1) : place + 1], key=lambda request: abs(request[0] - sent_ns))[1]
