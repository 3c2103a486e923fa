"""What a token's messages take on the links alone, in ms, by arm. Pure; computing takes no time here.

The formulas follow from who sends what to whom: hidden states, without what a program adds to them.
"""

from collections.abc import Callable
from typing import NamedTuple

from testbed.network.uniform import Links

Floor = Callable[[Links], float]

_FP32_BYTES = 4
_Q80_BLOCK = (32, 34)
"""Values of a block of distributed-llama's 8-bit format, and its bytes: 32 codes and a scale in fp16."""
_SYNCS_PER_LAYER = 2


class Shape(NamedTuple):
    """What floors depend on.

    Attributes:
        hidden: values of a hidden state.
        layers: layers with experts.
        top_k: experts that a token asks in each of them.
        slices: into which our bundle cuts each expert.
        kv_heads: key-value heads, the most nodes of distributed-llama.
    """

    hidden: int
    layers: int
    top_k: int
    kv_heads: int
    slices: int = 1


def no_network(links: Links) -> float:
    """One device alone."""
    return 0.0


def experts(shape: Shape, devices: int, request_bytes: float, answer_bytes: float) -> Floor:
    """Every layer asks experts on devices at once: L (R + request + answer); on a shared channel, they take turns."""

    def floor_ms(links: Links) -> float:
        at_once = min(shape.top_k * shape.slices, devices) if links.shared_air else 1
        return shape.layers * (links.rtt_ms + at_once * _ms(request_bytes + answer_bytes, links))

    return floor_ms


def pipeline(shape: Shape, workers: int) -> Floor:
    """Layers on workers, one worker after the other: N (R + a hidden state in fp32 there and back)."""

    def floor_ms(links: Links) -> float:
        return workers * (links.rtt_ms + 2 * _ms(shape.hidden * _FP32_BYTES, links))

    return floor_ms


def tensor_parallel(shape: Shape, nodes: int) -> Floor:
    """Every node computes a part of each layer, and all exchange sums twice per layer: 2 L (R + N q) + R.

    q is a hidden state in distributed-llama's 8-bit format. The root is on the base station, so two workers reach each
    other by two links. On a shared channel every message on every link takes its turn: 2 (N - 1)² of them.
    """
    values, bytes_ = _Q80_BLOCK
    state_bytes = shape.hidden / values * bytes_

    def floor_ms(links: Links) -> float:
        if nodes == 1:
            return 0.0
        messages = 2 * (nodes - 1) ** 2 if links.shared_air else nodes
        exchange_ms = links.rtt_ms + messages * _ms(state_bytes, links)
        return _SYNCS_PER_LAYER * shape.layers * exchange_ms + links.rtt_ms

    return floor_ms


def _ms(bytes_: float, links: Links) -> float:
    return 8e-3 * bytes_ / links.mbps
