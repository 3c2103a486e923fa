"""Answers that are finite and yet absurd: a node whose memory or arithmetic is broken, or that lies. Pure."""

import numpy as np

from wire.tensors import Array

LEARN_ROWS = 32
FACTOR = 20.0
"""Above the largest gain seen. On the demo model the largest of six prompts is at most twice that of the first eight
rows of the first one; the first token of a sequence has gains a hundred times the median, which sets most bounds."""


class GainGuard:
    """Learns, per layer, how much longer than its input an expert's output may be: ‖y‖ / ‖x‖ of one row."""

    def __init__(self, layers: int) -> None:
        self._largest = [0.0] * layers
        self._rows = [0] * layers

    def accepts(self, layer: int, x: Array, y: Array) -> bool:
        """Whether outputs float32 [rows, hidden] are plausible for their inputs; those that are teach."""
        length = np.maximum(np.linalg.norm(x, axis=1), np.float32(1e-12))
        gain = float((np.linalg.norm(y, axis=1) / length).max())
        if self._rows[layer] >= LEARN_ROWS and gain > FACTOR * self._largest[layer]:
            return False
        self._rows[layer] += len(x)
        self._largest[layer] = max(self._largest[layer], gain)
        return True
