"""The least of recent values, in constant memory. Pure."""

import math


class RecentLeast:
    """The least value of this turn and of the one before."""

    __slots__ = ("_began_s", "_last", "_this", "_turn_s")

    def __init__(self, turn_s: float) -> None:
        """No value yet.

        Args:
            turn_s: how long a turn lasts; a value is forgotten after once to twice that time.
        """
        self._turn_s = turn_s
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
        if since_s > self._turn_s:
            self._last = self._this if since_s <= 2 * self._turn_s else math.inf
            self._this = math.inf
            self._began_s = now_s
