"""Sensitivity to the constants of the rule `wdmoe`, which the papers leave open: time and pairs saved over θ and γ."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bs_coordinator.selection.wdmoe import Wdmoe
from testbed.radio.replay import Allocation
from testbed.radio.results import Comparison, Latency
from testbed.radio.setting import Cell
from testbed.radio.traces import RoutingTrace

THETAS = (0.3, 0.4, 0.5, 0.6, 0.64, 0.7, 0.76, 0.82, 0.86, 0.9, 0.95, 1.0)
"""Starting values that reach the rule's last θ in whole steps; from others the search would end just below it."""
GAINS = (1.0, 1.05, 1.1, 1.15, 1.2, 1.3, 1.5, 2.0)
_ALLOCATIONS: tuple[Allocation, ...] = ("uniform", "optimal")


@dataclass(frozen=True, slots=True)
class Point:
    """Latencies with one choice of constants.

    Attributes:
        theta: start value θ of the threshold search.
        gain: factor γ at which the search ends; None for a fixed threshold.
        latencies: latencies per allocation.
    """

    theta: float
    gain: float | None
    latencies: tuple[Latency, ...]


def sweep(
    trace: RoutingTrace,
    cell: Cell,
    *,
    seed: int,
    thetas: Sequence[float] = THETAS,
    gains: Sequence[float] = GAINS,
) -> Iterator[Point]:
    """Replay prompts (prefill) for all combinations, and for fixed thresholds; other constants keep their defaults.

    Args:
        trace: routing trace.
        cell: simulated cell.
        seed: seeds the intervals.
        thetas: values of θ.
        gains: values of γ.
    """
    comparison = Comparison(trace, cell, "prefill", seed=seed)
    last = Wdmoe(trace.facts.top_k).stop
    for gain in (*gains, None):
        for theta in thetas:
            policy = f"wdmoe:start={theta:g},stop={max(theta, last) if gain else theta:g},gain={gain or 1:g}"
            yield Point(theta, gain, tuple(comparison.latencies(policy, _ALLOCATIONS)))
