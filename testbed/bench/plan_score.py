"""How well predictions of fleets agree with measurements. Pure."""

from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

CLOSE = 0.05
"""Two fleets whose measured times differ by less than this share are as fast as each other, for all that is known."""


class PlanScore(NamedTuple):
    """Agreement of predicted with measured times.

    Attributes:
        fleets: number of fleets.
        within_20: of these, predicted within 20 % of what was measured.
        pairs: pairs of fleets whose measured times differ by at least `CLOSE`.
        right: of these, where the fleet that was predicted to be faster was.
        all_pairs, all_right: the same for all pairs.
    """

    fleets: int
    within_20: int
    pairs: int
    right: int
    all_pairs: int
    all_right: int


def score(times: Sequence[tuple[float, float]]) -> PlanScore:
    """Score fleets.

    Args:
        times: predicted and measured time of each fleet, in one unit.
    """
    pairs = right = all_right = all_pairs = 0
    for (predicted_a, measured_a), (predicted_b, measured_b) in combinations(times, 2):
        agrees = (predicted_a < predicted_b) == (measured_a < measured_b)
        apart = abs(measured_a - measured_b) >= CLOSE * min(measured_a, measured_b)
        all_pairs += 1
        all_right += agrees
        pairs += apart
        right += apart and agrees
    within = sum(abs(predicted - measured) <= 0.2 * measured for predicted, measured in times)
    return PlanScore(len(times), within, pairs, right, all_pairs, all_right)
