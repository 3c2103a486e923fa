"""What a decoding step costs, and what time is worth: learnt from the steps of all sequences of a model. Pure."""

_MEMORY = 0.95
"""Of the line: about twenty steps, so that it follows a link that changes."""
_FIRST_ROW = 0.03
"""What a further row costs before any was tried, as a share of a step."""
_BELIEF = 1.0
"""Steps, one row away from the mean, that the slope so far counts as."""
_YIELD_MEMORY = 0.9


class StepCost:
    """A line through seconds over rows, recent steps first, and what a sequence gets out of a step.

    Attributes:
        widest: most rows that a step has had.
        since_plain: steps since one without drafts.
        row_s: what one more row adds to a step.
    """

    def __init__(self) -> None:
        self.widest = 1
        self.row_s = 0.0
        self.since_plain = 0
        self._weight = self._rows = self._rows2 = self._seconds = self._product = 0.0
        self._tokens_per_sequence = 1.0
        self._rows_per_sequence = 1.0

    @property
    def known(self) -> bool:
        """Whether any step was measured."""
        return self._weight > 0.0

    def observe(self, rows: int, seconds: float, *, sequences: int = 1, tokens: int = 1) -> None:
        """Take in one step.

        Args:
            rows: token positions that went through the model, drafts included.
            seconds: with the time that making drafts took left out.
            sequences: that shared the step.
            tokens: that came of it, of all sequences.
        """
        self.widest = max(self.widest, rows)
        self.since_plain = self.since_plain + 1 if rows > sequences else 0
        if not self.known:
            self.row_s = _FIRST_ROW * seconds / rows
        self._weight = _MEMORY * self._weight + 1.0
        self._rows = _MEMORY * self._rows + rows
        self._rows2 = _MEMORY * self._rows2 + rows * rows
        self._seconds = _MEMORY * self._seconds + seconds
        self._product = _MEMORY * self._product + rows * seconds
        mean_rows, mean_s = self._rows / self._weight, self._seconds / self._weight
        spread = self._rows2 - self._rows * mean_rows
        # What was believed before counts too: it decides while all steps are of one size.
        slope = (self._product - self._rows * mean_s + _BELIEF * self.row_s) / (spread + _BELIEF)
        self.row_s = max(0.0, min(slope, mean_s / mean_rows))
        keep, new = _YIELD_MEMORY, 1.0 - _YIELD_MEMORY
        self._tokens_per_sequence = keep * self._tokens_per_sequence + new * tokens / sequences
        self._rows_per_sequence = keep * self._rows_per_sequence + new * rows / sequences

    def seconds(self, rows: float) -> float:
        """Expected time of a step."""
        if not self.known:
            return 0.0
        return max(1e-6, self._seconds / self._weight + (rows - self._rows / self._weight) * self.row_s)

    def plain_s(self, sequences: int = 1) -> float:
        """What one token of one sequence costs without drafts, its share of the step."""
        return self.seconds(sequences) / sequences

    def tokens_per_s(self, sequences: int = 1) -> float:
        """What a second brings at the present yield, of all sequences together: time's price."""
        now = sequences * self._tokens_per_sequence / self.seconds(sequences * self._rows_per_sequence)
        return max(now, 1.0 / self.plain_s(sequences))
