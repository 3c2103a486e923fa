"""The least of recent values, in constant memory. Pure."""

import math

_TURN_S = 10.0


class RecentLeast:
    """The least value of the last 10 to 20 s: of this turn and of the one before."""

    __slots__ = ("_began_s", "_last", "_this")

    def __init__(self) -> None:
        self._began_s = -math.inf
        self._last = self._this = math.inf

    def observe(self, time_s: float, value: float) -> None:
        """Take in a value."""
        self._turn(time_s)
        self._this = min(self._this, value)

    def least(self, now_s: float) -> float:
        """The least value; infinite if there is none."""
        self._turn(now_s)
        return min(self._last, self._this)

    def _turn(self, now_s: float) -> None:
        since_s = now_s - self._began_s
        if since_s > _TURN_S:
            self._last = self._this if since_s <= 2 * _TURN_S else math.inf
            self._this = math.inf
            self._began_s = now_s
