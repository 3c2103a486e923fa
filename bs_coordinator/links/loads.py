"""What a node's reading of experts into memory costs, where it does not keep all that it answers for.

Kept apart from computing: loads come or don't, a hundred times as long as the arithmetic, and an average of both is
neither.
"""

import math

_MEMORY = 0.98
"""Per distinct expert asked for: the last fifty count."""
_NOTHING_S = 1e-6


class LoadEstimator:
    """The estimate of one node.

    Attributes:
        expert_s: mean per distinct expert asked for, those in memory counted as 0.
        worst_s: the longest of late; fades.
    """

    __slots__ = ("expert_s", "worst_s")

    def __init__(self) -> None:
        self.expert_s = 0.0
        self.worst_s = 0.0

    def observe(self, load_s: float, experts: int) -> None:
        """Take in what the loads of one request took, for this many distinct experts."""
        if not (math.isfinite(load_s) and load_s >= 0 and experts > 0) or load_s == self.worst_s == 0:
            return
        keep = _MEMORY**experts
        self.expert_s = keep * self.expert_s + (1 - keep) * load_s / experts
        self.worst_s = max(keep * self.worst_s, load_s)
        if self.worst_s < _NOTHING_S:
            self.expert_s = self.worst_s = 0.0
