"""Answers that are finite and yet suspicious: a node whose memory or arithmetic is broken, or that lies. Pure.

Size alone proves nothing: the first token of a sequence makes experts of some layers answer hundreds of times as large
as any other token does. So a suspicious answer is compared with another holder's.
"""

import math

import numpy as np

from wire.tensors import Array

LEARN_ROWS = 32
FACTOR = 20.0
"""Above the largest gain seen."""
AGREEMENT = 0.3
"""Relative difference up to which two holders gave the same answer: int4 of one and int8 of another differ by 0.15."""


class OutputGuard:
    """Learns, per layer, how much longer than its input an expert's output may be: ‖y‖ / ‖x‖ of one row."""

    def __init__(self, layers: int) -> None:
        self._largest = [0.0] * layers
        self._rows = [0] * layers

    def suspects(self, layer: int, gain: float) -> bool:
        """Whether outputs are too large for their inputs, as far as is known.

        Args:
            gain: the largest of all rows, see `largest_gain`.
        """
        return self._rows[layer] >= LEARN_ROWS and gain > FACTOR * self._largest[layer]

    def learn(self, layer: int, rows: int, gain: float) -> None:
        """These were right."""
        self._rows[layer] += rows
        self._largest[layer] = max(self._largest[layer], gain)


def largest_gain(x: Array, y: Array) -> float:
    """The largest ‖y‖ / ‖x‖ of the rows of float32 [rows, hidden]; infinite where a square does not fit float32."""
    if len(x) == 1:
        return math.sqrt(float(np.dot(y[0], y[0])) / max(float(np.dot(x[0], x[0])), 1e-24))
    shrink = np.maximum(np.einsum("ij,ij->i", x, x), np.float32(1e-24))
    return math.sqrt(float((np.einsum("ij,ij->i", y, y) / shrink).max()))


def agree(first: Array, second: Array) -> bool:
    """Whether two answers float32 [rows, hidden] to one question are the same but for quantisation."""
    size = max(float(np.linalg.norm(first)), float(np.linalg.norm(second)))
    return float(np.linalg.norm(first - second)) <= AGREEMENT * size
