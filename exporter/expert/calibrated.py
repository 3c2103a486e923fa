"""Blockwise codes with the least error of the outputs on known inputs, in the format of `encoders.BlockEncoder`.

Scales and zero points are searched per block with the inputs' mean squares as weights. Codes are rounded column by
column, and each column makes up for the rounding errors of those before it (GPTQ, Frantar et al. 2022, arXiv
2210.17323, in the equivalent form of LDLQ, Chee et al. 2023, arXiv 2307.13304), from the column with the largest inputs
to that with the smallest.
"""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from exporter.expert.encoders import BlockEncoder, Stored
from exporter.expert.layer_inputs import MOST_ROWS
from wire.manifest import Dims
from wire.tensors import Array

METHOD: Literal["gptq"] = "gptq"
_DAMPING = 0.5
"""Added to the second moments' diagonal, relative to its mean: inputs that the text lacks count, too."""
_SHRINKS = tuple(np.linspace(1.0, 0.7, 11, dtype=np.float32))
"""Scales to try, relative to those that span all weights of a block."""
_COLUMNS = 64
"""Columns after which the errors so far are applied to those that follow, as one product."""


def calibration_bytes(dims: Dims, tokens: int) -> int:
    """RAM that calibrating an expert takes at most, besides what an export takes anyway.

    Args:
        tokens: of the calibration text.
    """
    widest, rows = max(dims.hidden, dims.intermediate), min(tokens, MOST_ROWS)
    moments = 3 * 4 * widest**2  # numpy's Cholesky takes a copy, and returns another
    matrix = 9 * dims.hidden * dims.intermediate  # weights, errors and codes
    return moments + matrix + 3 * 4 * rows * dims.intermediate + 6 * tokens * dims.hidden


class InputStatistics:
    """Second moments of a matrix's inputs, prepared for `CalibratedEncoder`.

    Attributes:
        importance: mean square of each input, float32 [columns].
        order: the columns, in the order in which they are rounded.
        feedback: float32 [columns, columns] in this order, upper triangular: how much of the error of row's column
            each later column takes over.
    """

    def __init__(self, inputs: Array, weights: Array) -> None:
        """Compute them.

        Args:
            inputs: float32 [rows, columns].
            weights: how much each row counts, float32 [rows].
        """
        scaled = inputs * (weights / np.float32(np.linalg.norm(weights) or 1.0))[:, None]
        # numpy computes a matrix times its own transpose at half the cost.
        moments = scaled.T @ scaled
        self.importance = moments.diagonal().copy()
        self.order = np.argsort(-self.importance, kind="stable")
        # moments = U D Uᵀ with U unit upper triangular: Cholesky's factor of the matrix turned upside down.
        turned = moments[np.ix_(self.order[::-1], self.order[::-1])]
        del moments
        turned[np.diag_indices_from(turned)] += np.float32(_DAMPING * self.importance.mean() or 1.0)
        self.feedback = np.linalg.cholesky(turned)[::-1, ::-1]
        self.feedback /= self.feedback.diagonal().copy()


class CalibratedEncoder(BlockEncoder):
    """4- or 8-bit codes of one [rows, columns] matrix for given inputs. The whole matrix is kept until `finish`."""

    def __init__(
        self, rows: int, columns: int, bits: int, block: int, symmetric: bool, statistics: InputStatistics
    ) -> None:
        super().__init__(rows, columns, bits, block, symmetric)
        self._statistics = statistics
        self._importance = np.zeros(self._blocks * block, np.float32)
        self._importance[:columns] = statistics.importance
        # One row per column: each step works on whole columns.
        self._values = np.empty((columns, rows), np.float32)
        self._scale_of, self._zero_of = np.empty((2, self._blocks, rows), np.float32)

    def encode(self, rows: Array) -> Stored:
        """Keep the next rows, float32 [rows, columns], and choose their scales; nothing is appended yet."""
        where = slice(self._done, self._done + len(rows))
        super().encode(rows)
        self._values[:, where] = rows.T
        return self._codes[:0]

    def finish(self) -> list[Stored]:
        """All parts, in order."""
        codes = self._round()
        rows = codes.shape[1]
        stored = np.empty((rows, self._blocks * self._block), np.uint8)
        stored[:, : self._columns] = codes.T
        # Padding is zero.
        stored[:, self._columns :] = self._zero_of[-1].astype(np.uint8)[:, None]
        if self._bits == 4:
            np.left_shift(stored[:, 1::2], 4, out=stored[:, 1::2])
            stored = stored[:, 0::2] | stored[:, 1::2]
        return [stored, *super().finish()]

    def _ranges(self, blocks: Array) -> tuple[Array, Array]:
        """Scales and zero points, both float32 [blocks], with the least weighted error of [blocks, block] weights."""
        first_scale, first_zero = super()._ranges(blocks)
        count = len(blocks) // self._blocks
        importance = np.tile(self._importance.reshape(self._blocks, self._block), (count, 1))
        low, high = np.minimum(blocks.min(axis=1), 0), np.maximum(blocks.max(axis=1), 0)
        top = np.float32(2**self._bits - 1)
        best = np.full(len(blocks), np.inf, np.float32)
        scale, zero = first_scale.copy(), first_zero.copy()
        for shrink in _SHRINKS:
            tried = first_scale * shrink
            inverse = _inverse(tried)
            middle = first_zero
            if not self._symmetric and shrink != 1:
                # Both ends are cut by the same amount.
                middle = np.clip(np.floor((top + 1) / 2 - (low + high) / 2 * inverse), 0, top)
            codes = np.clip(np.floor(blocks * inverse[:, None] + (middle + np.float32(0.5))[:, None]), 0, top)
            errors = (codes - middle[:, None]) * tried[:, None] - blocks
            found = np.einsum("bi,bi,bi->b", errors, errors, importance)
            better = found < best
            best[better], scale[better], zero[better] = found[better], tried[better], middle[better]
        where = slice(self._done - count, self._done)
        self._scale_of[:, where] = scale.reshape(count, self._blocks).T
        self._zero_of[:, where] = zero.reshape(count, self._blocks).T
        return scale, zero

    def _round(self) -> NDArray[np.uint8]:
        """Codes [columns, rows]."""
        order, feedback = self._statistics.order, self._statistics.feedback
        top = np.float32(2**self._bits - 1)
        inverse_of, half = _inverse(self._scale_of), np.float32(0.5)
        errors = np.zeros((len(order), self._values.shape[1]), np.float32)
        codes = np.empty(self._values.shape, np.uint8)
        for start in range(0, len(order), _COLUMNS):
            stop = min(start + _COLUMNS, len(order))
            owed = feedback[:start, start:stop].T @ errors[:start]
            for i in range(start, stop):
                column = order[i]
                block = column // self._block
                scale, zero = self._scale_of[block], self._zero_of[block]
                wanted = self._values[column] + owed[i - start]
                code = np.clip(np.floor(wanted * inverse_of[block] + (zero + half)), 0, top)
                codes[column] = code
                errors[i] = self._values[column] - (code - zero) * scale
                owed[i - start + 1 :] += feedback[i, i + 1 : stop, None] * errors[i]
        return codes


def _inverse(scale: Array) -> Array:
    """1 / scale; 0 where the scale is too small to be inverted: such weights are practically zero."""
    with np.errstate(over="ignore"):
        inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale != 0)
    inverse[np.isinf(inverse)] = 0
    return inverse
