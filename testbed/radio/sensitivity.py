"""How much the `wdmoe` rule's constants matter, which are ours: time saved and pairs dropped over θ and γ."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bs_coordinator.selection.wdmoe import Wdmoe
from testbed.radio.replay import Allocation
from testbed.radio.results import Arena, Latency
from testbed.radio.setting import Cell
from testbed.radio.traces import RoutingTrace

THETAS = (0.3, 0.4, 0.5, 0.6, 0.64, 0.7, 0.76, 0.82, 0.86, 0.9, 0.95, 1.0)
"""Up to the rule's last θ in whole steps of it: from others the search would end just below."""
GAINS = (1.0, 1.05, 1.1, 1.15, 1.2, 1.3, 1.5, 2.0)
_ALLOCATIONS: tuple[Allocation, ...] = ("uniform", "optimal")


@dataclass(frozen=True, slots=True)
class Point:
    """One choice of constants.

    Attributes:
        theta: where the search for the threshold starts.
        gain: γ at which it ends; None for a threshold that stays where it starts.
        latencies: with each allocation.
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
    """Replay prompts (prefill) for all combinations, and for fixed thresholds; other constants have their defaults."""
    arena = Arena(trace, cell, "prefill", seed=seed)
    last = Wdmoe(trace.facts.top_k).stop
    for gain in (*gains, None):
        for theta in thetas:
            policy = f"wdmoe:start={theta:g},stop={max(theta, last) if gain else theta:g},gain={gain or 1:g}"
            yield Point(theta, gain, tuple(arena.latencies(policy, _ALLOCATIONS)))
