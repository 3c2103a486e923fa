"""Answers that are finite and yet suspicious: a node whose memory or arithmetic is broken, or that lies. Pure.

Size alone proves nothing: the first token of a sequence makes experts of some layers answer hundreds of times as large
as any other token does. So a suspicious answer is compared with another holder's.
"""

import numpy as np

from wire.tensors import Array

LEARN_ROWS = 32
FACTOR = 20.0
"""Above the largest gain seen."""
AGREEMENT = 0.3
"""Relative difference up to which two holders gave the same answer: int4 of one and int8 of another differ by 0.15."""


class GainGuard:
    """Learns, per layer, how much longer than its input an expert's output may be: ‖y‖ / ‖x‖ of one row."""

    def __init__(self, layers: int) -> None:
        self._largest = [0.0] * layers
        self._rows = [0] * layers

    def suspects(self, layer: int, x: Array, y: Array) -> bool:
        """Whether outputs float32 [rows, hidden] are too large for their inputs, as far as is known."""
        return self._rows[layer] >= LEARN_ROWS and _gain(x, y) > FACTOR * self._largest[layer]

    def learn(self, layer: int, x: Array, y: Array) -> None:
        """These were right."""
        self._rows[layer] += len(x)
        self._largest[layer] = max(self._largest[layer], _gain(x, y))


def agree(first: Array, second: Array) -> bool:
    """Whether two answers float32 [rows, hidden] to one question are the same but for quantisation."""
    size = max(float(np.linalg.norm(first)), float(np.linalg.norm(second)))
    return float(np.linalg.norm(first - second)) <= AGREEMENT * size


def _gain(x: Array, y: Array) -> float:
    length = np.maximum(np.linalg.norm(x, axis=1), np.float32(1e-12))
    return float((np.linalg.norm(y, axis=1) / length).max())
