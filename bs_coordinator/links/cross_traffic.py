"""Cross traffic: how long a layer's messages wait for each other in the base station's process and in the broker.

A prompt asks all nodes at once, and its messages pass through one process and one broker, one after the other. That
delay does not belong to the links and must not be attributed to them. Pure.
"""

import statistics
from collections.abc import Sequence

from msgspec.structs import replace

from bs_coordinator.links.estimator import LinkSample

MIN_LAYER_BYTES = 16_000
"""In a layer that carries less, both directions together, messages do not delay each other noticeably."""
_MIN_LEARNING_BYTES = 64_000
"""A layer must carry this much to teach something."""
_LEARNING_RATE = 0.5
_MAX_S_PER_BYTE = 1e-6
_MAX_SHARE = 0.8
"""Most of a round trip that may be attributed to cross traffic: some must remain for the link."""


class CrossTraffic:
    """Delay per byte of other messages, learnt from layers that carry many bytes.

    Attributes:
        s_per_byte: seconds that a message waits for each byte to and from other nodes.
    """

    __slots__ = ("s_per_byte",)

    def __init__(self) -> None:
        self.s_per_byte = 0.0

    def learn(self, samples: Sequence[LinkSample], predicted_s: Sequence[float]) -> None:
        """Take in by how much a layer's round trips exceed what their links alone would take.

        Args:
            samples: of one layer.
            predicted_s: by sample, the predicted round trip without the node's time.
        """
        other = other_bytes(samples)
        if sum(s.down_bytes + s.up_bytes for s in samples) < _MIN_LEARNING_BYTES:
            return
        seen = statistics.median(
            (sample.network_s - s) / b for sample, s, b in zip(samples, predicted_s, other, strict=True)
        )
        seen = max(0.0, min(seen, _MAX_S_PER_BYTE))
        self.s_per_byte += _LEARNING_RATE * (seen - self.s_per_byte) if self.s_per_byte else seen

    def subtract(self, samples: Sequence[LinkSample]) -> list[LinkSample]:
        """A layer's samples, with the estimated delay by cross traffic as `contention_s`."""
        return [
            replace(sample, contention_s=max(0.0, min(b * self.s_per_byte, _MAX_SHARE * sample.network_s)))
            for sample, b in zip(samples, other_bytes(samples), strict=True)
        ]


def other_bytes(samples: Sequence[LinkSample]) -> list[int]:
    """For each sample of a layer, the bytes that all others carried, both directions together."""
    total = sum(s.down_bytes + s.up_bytes for s in samples)
    return [total - s.down_bytes - s.up_bytes for s in samples]
