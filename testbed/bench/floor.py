"""What decoding can't be faster than on given links: configured links, and everything else measured alone. Pure.

Per layer the trunk's part and the slowest of the nodes that were used, `rtt + down / R + compute + up / R`; per token
all layers and the head. What was measured beyond it is told apart by cause.
"""

from collections.abc import Callable
from typing import NamedTuple

from bs_coordinator.engine.step_records import DispatchRecord, LayerRecord, StepRecord


class Link(NamedTuple):
    """A configured link, the same both ways."""

    rtt_ms: float
    mbps: float

    def ms(self, dispatch: DispatchRecord) -> float:
        """A request and its answer on it."""
        return self.rtt_ms + (dispatch.down_bytes + dispatch.up_bytes) * 8e-3 / self.mbps


class Alone(NamedTuple):
    """Times of the parts, each with nothing beside it.

    Attributes:
        trunk_ms: all layers' attention, norms and gates for one token.
        head_ms: embedding, last norm and head.
        compute_ms: of a request, by its number of experts; of one row.
    """

    trunk_ms: float
    head_ms: float
    compute_ms: Callable[[int], float]


def floor_ms(step: StepRecord, link: Link, alone: Alone) -> float:
    """A decode step's floor."""
    return alone.trunk_ms + alone.head_ms + sum(_layer_ms(layer, link, alone) for layer in step.layers)


def causes_ms(step: StepRecord, link: Link, alone: Alone) -> dict[str, float]:
    """What a step took beyond its floor, by cause; the causes add up to it.

    - trunk and choosing: the base station from one layer's sum to the next layer's chosen experts, beyond the trunk
      alone: policy, forecast, and a trunk that is slower beside other processes;
    - network: the slowest round trip, less the node's own time and the configured link: broker, kernels, MQTT clients
      and waiting for a core;
    - nodes: their experts slower than alone, decoding, encoding, waiting in their queue;
    - requests: encoding and sending before the slowest node's turn, adding up after its answer.
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


def _layer_ms(layer: LayerRecord, link: Link, alone: Alone) -> float:
    return max((link.ms(d) + alone.compute_ms(len(d.experts)) for d in layer.dispatches), default=0.0)
