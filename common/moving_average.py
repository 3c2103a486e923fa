"""An exponentially weighted moving average."""


class MovingAverage:
    """A mean in which older observations count less: `value` ← keep · value + (1 − keep) · observation.

    Attributes:
        value: the mean; 0 before any observation, if it began without a value.
    """

    __slots__ = ("_begun", "_keep", "value")

    def __init__(self, keep: float, value: float | None = 0.0) -> None:
        """Start at `value`.

        Args:
            keep: weight of what was known before, for each new observation; 0.9 averages about the last ten.
            value: the mean before any observation; None to begin with the first observation.
        """
        self.value = value or 0.0
        self._begun = value is not None
        self._keep = keep

    def add(self, total: float, count: int = 1) -> float:
        """Take in observations and return the new mean.

        Args:
            total: sum of the observations.
            count: number of observations.
        """
        keep = self._keep**count if self._begun else 0.0
        self._begun = True
        self.value = keep * self.value + (1 - keep) * total / count
        return self.value
