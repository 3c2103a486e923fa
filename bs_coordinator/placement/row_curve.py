"""Times that depend on a number of rows or devices, known for some numbers. Pure."""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from bs_coordinator.selection.forecast import Float


class RowCurve(NamedTuple):
    """Values at some numbers of rows: straight lines between them, and beyond the last one as steep as before it.

    A single point stands for all numbers.

    Attributes:
        rows: ascending.
        values: one for each.
    """

    rows: tuple[int, ...]
    values: tuple[float, ...]

    @classmethod
    def line(cls, first: float, further: float) -> "RowCurve":
        """A value for one row, and what each further one adds."""
        return cls((1, 2), (first, first + further))

    @property
    def first(self) -> float:
        """The value for one row."""
        return float(self.at(1))

    def scaled(self, factor: float) -> "RowCurve":
        """The curve with all values multiplied."""
        return RowCurve(self.rows, tuple(factor * value for value in self.values))

    def at(self, rows: ArrayLike) -> Float:
        """The value at each of these numbers of rows; they need not be whole."""
        numbers = np.asarray(rows, np.float64)
        found: Float = np.interp(numbers, self.rows, self.values)
        if len(self.rows) > 1:
            slope = (self.values[-1] - self.values[-2]) / (self.rows[-1] - self.rows[-2])
            found = found + slope * np.maximum(numbers - self.rows[-1], 0.0)
        return found
