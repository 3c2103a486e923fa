"""Lower bound of the decoding time on given links: configured links, and all other parts measured alone. Pure.

Per layer it is the trunk's time plus the time of the slowest node, `rtt + down / R + compute + up / R`; per token the
sum over layers plus the head. The time beyond it is split by cause.
"""

from collections.abc import Callable
from typing import NamedTuple

from bs_coordinator.engine.step_records import DispatchRecord, LayerRecord, StepRecord


class FloorLink(NamedTuple):
    """A configured link, equal in both directions."""

    rtt_ms: float
    mbps: float

    def ms(self, dispatch: DispatchRecord) -> float:
        """Time in ms of a request and its answer on this link."""
        return self.one_way_ms(dispatch.down_bytes) + self.one_way_ms(dispatch.up_bytes)

    def one_way_ms(self, frame_bytes: int) -> float:
        """Time in ms of a frame in one direction."""
        return self.rtt_ms / 2 + frame_bytes * 8e-3 / self.mbps


class Alone(NamedTuple):
    """Times of the parts, each measured alone.

    Attributes:
        trunk_ms: attention, norms and gates of all layers for one token.
        head_ms: embedding, last norm and head.
        compute_ms: computing time of a request with one row, by its number of experts.
    """

    trunk_ms: float
    head_ms: float
    compute_ms: Callable[[int], float]


def floor_ms(step: StepRecord, link: FloorLink, alone: Alone) -> float:
    """Lower bound of a decode step, in ms."""
    return alone.trunk_ms + alone.head_ms + sum(_layer_ms(layer, link, alone) for layer in step.layers)


def causes_ms(step: StepRecord, link: FloorLink, alone: Alone) -> dict[str, float]:
    """Time of a step beyond its floor by cause, in ms; the causes add up to the difference.

    - trunk and choosing: the base station's time from one layer's sum to the next layer's choice of experts, beyond
      the trunk alone: policy, forecast, and a trunk slowed down by other processes;
    - network: the slowest round trip, minus the node's own time and the configured link: broker, kernels, MQTT
      clients and waiting for a core;
    - nodes: experts slower than alone, decoding, encoding, waiting in the queue;
    - requests: encoding and sending before the slowest node's request, summing after its answer.
    """
    trunk = sum(layer.trunk_ns for layer in step.layers) / 1e6 - alone.trunk_ms
    head = step.head_ns / 1e6 - alone.head_ms
    network = nodes = requests = 0.0
    for layer in step.layers:
        slowest = layer.critical
        if slowest is None:
            requests += layer.dispatch_ns / 1e6
            continue
        own = slowest.durations.total_ns / 1e6
        compute = alone.compute_ms(len(slowest.experts))
        nodes += own - compute
        network += slowest.round_trip_ns / 1e6 - own - (_layer_ms(layer, link, alone) - compute)
        requests += (layer.dispatch_ns - slowest.round_trip_ns) / 1e6
    rest = step.total_ns / 1e6 - floor_ms(step, link, alone) - trunk - head - network - nodes - requests
    return {
        "trunk and choosing": trunk,
        "head": head,
        "network": network,
        "nodes": nodes,
        "requests": requests,
        "between layers": rest,
    }


def _layer_ms(layer: LayerRecord, link: FloorLink, alone: Alone) -> float:
    return max((link.ms(d) + alone.compute_ms(len(d.experts)) for d in layer.dispatches), default=0.0)
