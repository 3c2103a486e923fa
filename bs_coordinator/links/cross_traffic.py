"""What a layer's messages wait for each other on machines that they share: the base station's own, and the broker's.

A prompt asks all nodes at once, and its messages leave and arrive through one process and one broker, one after the
other. On links of their own that is no matter of the links, and would otherwise be taken for one. Pure.
"""

import statistics
from collections.abc import Sequence
from dataclasses import replace

from bs_coordinator.links.estimator import LinkSample

CROWD_BYTES = 16_000
"""A layer with less to carry, both ways together, is not crowded."""
_TELLING_BYTES = 64_000
_LEARNING = 0.5
_MOST_S_PER_BYTE = 1e-6
_MOST_SHARE = 0.8
"""Some of a round trip must remain the link's own."""


class CrossTraffic:
    """Time per byte of other messages, learnt from layers that carry many.

    Attributes:
        s_per_byte: what a message waits for each byte to and from other nodes.
    """

    __slots__ = ("s_per_byte",)

    def __init__(self) -> None:
        self.s_per_byte = 0.0

    def learn(self, samples: Sequence[LinkSample], predicted_s: Sequence[float]) -> None:
        """Take in a layer that carried enough to tell, by what its messages took beyond what their links foretell.

        Args:
            samples: of one layer.
            predicted_s: by sample, of links that are known: round trip without the node's time.
        """
        beside = beside_bytes(samples)
        if sum(s.down_bytes + s.up_bytes for s in samples) < _TELLING_BYTES:
            return
        seen = statistics.median(
            (sample.network_s - s) / b for sample, s, b in zip(samples, predicted_s, beside, strict=True)
        )
        seen = max(0.0, min(seen, _MOST_S_PER_BYTE))
        self.s_per_byte += _LEARNING * (seen - self.s_per_byte) if self.s_per_byte else seen

    def take_off(self, samples: Sequence[LinkSample]) -> list[LinkSample]:
        """The same samples, less what they presumably waited for each other."""
        return [
            replace(sample, contention_s=max(0.0, min(b * self.s_per_byte, _MOST_SHARE * sample.network_s)))
            for sample, b in zip(samples, beside_bytes(samples), strict=True)
        ]


def beside_bytes(samples: Sequence[LinkSample]) -> list[int]:
    """By sample, what the others carried, both ways together."""
    total = sum(s.down_bytes + s.up_bytes for s in samples)
    return [total - s.down_bytes - s.up_bytes for s in samples]
