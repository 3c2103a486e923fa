"""What a decoding step costs, and what time is worth: learnt from the steps of all sequences of a model. Pure."""

from common.moving_average import MovingAverage

_MEMORY = 0.95
"""Weight of earlier steps in the regression, per step: about twenty steps count, to follow a link that changes."""
_FIRST_ROW_SHARE = 0.03
"""Assumed cost of a further row before any was tried, as a share of a step."""
_SLOPE_WEIGHT = 1.0
"""Weight of the previous slope, as a number of steps one row away from the mean."""
_YIELD_MEMORY = 0.9


class StepCost:
    """A weighted linear regression of a step's seconds on its rows, and the tokens that a step yields.

    Attributes:
        widest: largest number of rows in any step so far.
        since_plain: steps since the last one without drafts.
        row_s: seconds that one more row adds to a step.
    """

    def __init__(self) -> None:
        self.widest = 1
        self.row_s = 0.0
        self.since_plain = 0
        self._weight = self._rows = self._rows2 = self._seconds = self._product = 0.0
        self._tokens_per_sequence = MovingAverage(_YIELD_MEMORY, 1.0)
        self._rows_per_sequence = MovingAverage(_YIELD_MEMORY, 1.0)

    @property
    def known(self) -> bool:
        """Whether any step was measured."""
        return self._weight > 0.0

    def observe(self, rows: int, seconds: float, *, sequences: int = 1, tokens: int = 1) -> None:
        """Take in one step.

        Args:
            rows: token positions that went through the model, drafts included.
            seconds: duration of the step, without the time spent drafting.
            sequences: number of sequences that shared the step.
            tokens: number of tokens it yielded, for all sequences.
        """
        self.widest = max(self.widest, rows)
        self.since_plain = self.since_plain + 1 if rows > sequences else 0
        if not self.known:
            self.row_s = _FIRST_ROW_SHARE * seconds / rows
        self._weight = _MEMORY * self._weight + 1.0
        self._rows = _MEMORY * self._rows + rows
        self._rows2 = _MEMORY * self._rows2 + rows * rows
        self._seconds = _MEMORY * self._seconds + seconds
        self._product = _MEMORY * self._product + rows * seconds
        mean_rows, mean_s = self._rows / self._weight, self._seconds / self._weight
        spread = self._rows2 - self._rows * mean_rows
        # The previous slope counts too: it decides while all steps have the same number of rows.
        slope = (self._product - self._rows * mean_s + _SLOPE_WEIGHT * self.row_s) / (spread + _SLOPE_WEIGHT)
        self.row_s = max(0.0, min(slope, mean_s / mean_rows))
        self._tokens_per_sequence.add(tokens / sequences)
        self._rows_per_sequence.add(rows / sequences)

    def seconds(self, rows: float) -> float:
        """Expected duration of a step; 0 before any was measured."""
        if not self.known:
            return 0.0
        return max(1e-6, self._seconds / self._weight + (rows - self._rows / self._weight) * self.row_s)

    def plain_s(self, sequences: int = 1) -> float:
        """Seconds that one token of one sequence costs without drafts: its share of the step."""
        return self.seconds(sequences) / sequences

    def tokens_per_s(self, sequences: int = 1) -> float:
        """Tokens per second at the present yield, for all sequences together: the price of time."""
        rows = sequences * self._rows_per_sequence.value
        now = sequences * self._tokens_per_sequence.value / self.seconds(rows)
        return max(now, 1.0 / self.plain_s(sequences))
