"""Finds answers that are finite and yet suspicious: from a node with faulty memory or arithmetic, or a lying one. Pure.

Size alone proves nothing: for the first token of a sequence, some layers' experts give outputs hundreds of times larger
than for any other token. So a suspicious answer is compared with another holder's.
"""

import math

import numpy as np

from wire.tensors import Array

LEARN_ROWS = 32
"""Rows of a layer to see before any is suspicious."""
FACTOR = 20.0
"""A gain this many times the largest one seen is suspicious."""
AGREEMENT = 0.3
"""Relative difference up to which two answers count as the same: int4 and int8 of one expert differ by 0.15."""


class OutputGuard:
    """Learns, per layer, the largest gain ‖y‖ / ‖x‖ of a row x and its experts' weighted sum y."""

    def __init__(self, layers: int) -> None:
        self._largest = [0.0] * layers
        self._rows = [0] * layers

    def suspects(self, layer: int, gain: float) -> bool:
        """Whether an answer's largest gain is too large to be believed; False until enough rows were seen."""
        return self._rows[layer] >= LEARN_ROWS and gain > FACTOR * self._largest[layer]

    def learn(self, layer: int, rows: int, gain: float) -> None:
        """Take in the largest gain of an answer of `rows` rows that was right."""
        self._rows[layer] += rows
        self._largest[layer] = max(self._largest[layer], gain)


def largest_gain(x: Array, y: Array) -> float:
    """The largest ‖y‖ / ‖x‖ of the rows of float32 [rows, hidden]; not finite if a square overflows float32."""
    if len(x) == 1:
        return math.sqrt(float(np.dot(y[0], y[0])) / max(float(np.dot(x[0], x[0])), 1e-24))
    shrink = np.maximum(np.einsum("ij,ij->i", x, x), np.float32(1e-24))
    return math.sqrt(float((np.einsum("ij,ij->i", y, y) / shrink).max()))


def agree(first: Array, second: Array) -> bool:
    """Whether two answers to one request, float32 [rows, hidden], differ by no more than quantisation explains."""
    size = max(float(np.linalg.norm(first)), float(np.linalg.norm(second)))
    return float(np.linalg.norm(first - second)) <= AGREEMENT * size
