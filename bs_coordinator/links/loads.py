"""How long a node takes to load experts into memory, if it does not keep all that it serves.

Kept apart from computing: a load takes a hundred times as long as the arithmetic and does not happen in every request,
so an average of both would describe neither.
"""

import math

from common.moving_average import MovingAverage

_MEMORY = 0.98
"""Weight of what was known, per distinct expert asked for: about the last fifty count."""
_NEGLIGIBLE_S = 1e-6


class LoadEstimator:
    """Estimate of one node's loading times.

    Attributes:
        worst_s: the longest recent load of a request; fades.
    """

    __slots__ = ("_expert_s", "worst_s")

    def __init__(self) -> None:
        self._expert_s = MovingAverage(_MEMORY)
        self.worst_s = 0.0

    @property
    def expert_s(self) -> float:
        """Mean seconds per distinct expert asked for; experts that were in memory count as 0."""
        return self._expert_s.value

    def observe(self, load_s: float, experts: int) -> None:
        """Take in that one request loaded for `load_s` seconds and asked this many distinct experts."""
        if not (math.isfinite(load_s) and load_s >= 0 and experts > 0) or load_s == self.worst_s == 0:
            return
        self._expert_s.add(load_s, experts)
        self.worst_s = max(_MEMORY**experts * self.worst_s, load_s)
        if self.worst_s < _NEGLIGIBLE_S:
            self._expert_s.value = self.worst_s = 0.0
