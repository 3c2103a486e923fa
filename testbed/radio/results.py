"""Results of a simulation: mean latencies with intervals, drop rates, accuracy, and their tables. Pure."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bs_coordinator.airtime.allocation import Float
from bs_coordinator.selection import parse_policy
from testbed.radio.replay import ALLOCATIONS, PHASES, Allocation, Phase, batch_seconds, batches, replay
from testbed.radio.setting import Cell
from testbed.radio.traces import RoutingTrace
from testbed.statistics import Interval, Proportion, Ratio, difference, measured, ratio

VANILLA = "topk"


@dataclass(frozen=True, slots=True)
class Latency:
    """Latency of one policy with one bandwidth allocation.

    Attributes:
        phase: `prefill` or `decode`.
        policy: policy, as `parse_policy` reads it.
        allocation: how bandwidth is shared.
        mean_ms: mean time per token, over all tokens of all draws.
        median_ms: median over draws of the time per token.
        saved: time saved, as a share of the time of top-k with equal bandwidth shares on the same draws.
        dropped: share of top-k's (token, expert) pairs that were not requested.
    """

    phase: Phase
    policy: str
    allocation: Allocation
    mean_ms: Interval
    median_ms: float
    saved: Interval
    dropped: float


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Accuracy of one policy in one task, with the simulated links.

    Attributes:
        task: name of the task.
        policy: policy, as `parse_policy` reads it.
        right: correct answers in %.
        lost: percentage points lost against top-k on the same items.
        dropped: share of top-k's (token, expert) pairs that were not requested.
    """

    task: str
    policy: str
    right: Interval
    lost: Interval
    dropped: float


class Comparison:
    """Compares policies and allocations on the same batches of one phase, with top-k as baseline."""

    def __init__(self, trace: RoutingTrace, cell: Cell, phase: Phase, *, seed: int) -> None:
        self._facts = trace.facts
        self._cell = cell
        self._phase = phase
        self._seed = seed
        self._sent = batches(trace, phase, cell.draws, seed)
        self._tokens = np.array([batch.tokens for batch in self._sent], np.float64)
        vanilla = replay(parse_policy(VANILLA, top_k=trace.facts.top_k), self._sent, cell, top_k=trace.facts.top_k)
        self._pairs = vanilla.sum()
        self._vanilla = self._time(vanilla, "uniform")

    def latencies(self, policy: str, allocations: Iterable[Allocation] = ALLOCATIONS) -> list[Latency]:
        """Latencies of a policy, one per allocation.

        Args:
            policy: policy, as `parse_policy` reads it.
            allocations: allocations to compare.

        Raises:
            ValueError: the policy is unknown.
        """
        parsed = parse_policy(policy, top_k=self._facts.top_k, model_sha256=self._facts.model_sha256)
        rows = replay(parsed, self._sent, self._cell, top_k=self._facts.top_k)
        found = []
        for allocation in allocations:
            time_ms = self._time(rows, allocation)
            left = _present(ratio(time_ms, self._vanilla, seed=self._seed))
            low, high = (None if x is None else 1 - x for x in (left.high, left.low))
            found.append(
                Latency(
                    phase=self._phase,
                    policy=policy,
                    allocation=allocation,
                    mean_ms=_present(measured(time_ms, seed=self._seed)),
                    median_ms=float(np.median(time_ms.part / time_ms.whole) * time_ms.scale),
                    saved=Interval(1 - left.value, low, high, left.units),
                    dropped=float(1 - rows.sum() / self._pairs),
                )
            )
        return found

    def _time(self, rows: Float, allocation: Allocation) -> Ratio:
        return Ratio(batch_seconds(self._cell, rows, allocation), self._tokens, 1e3)


def compare_latency(trace: RoutingTrace, cell: Cell, policies: Sequence[str], *, seed: int) -> list[Latency]:
    """Replay a trace in each phase under each policy with each allocation, all on the same draws.

    Args:
        policies: policies, as `parse_policy` reads them.
        seed: seeds the choice of tokens for decoding, and the intervals.

    Raises:
        SimulationError: the cell's number of devices differs from the trace's number of experts.
        ValueError: a policy is unknown.
    """
    comparisons = [Comparison(trace, cell, phase, seed=seed) for phase in PHASES]
    return [row for comparison in comparisons for policy in policies for row in comparison.latencies(policy)]


def compare_accuracy(
    right: dict[str, dict[str, NDArray[np.bool_]]], asked: dict[str, float], top_k: int, *, seed: int
) -> list[Accuracy]:
    """Accuracy of each policy, and its loss against top-k.

    Args:
        right: by policy and task bool [items], whether each item was answered correctly; must include top-k.
        asked: by policy, requested experts per token and layer.
        top_k: experts per token and layer with top-k.
        seed: seeds the intervals.
    """
    rows = []
    for policy, tasks in right.items():
        for task, marks in tasks.items():
            points, of_vanilla = (
                Proportion(m.astype(np.float64), np.ones(len(m)), 100.0) for m in (marks, right[VANILLA][task])
            )
            rows.append(
                Accuracy(
                    task=task,
                    policy=policy,
                    right=_present(measured(points, seed=seed)),
                    lost=_present(difference(of_vanilla, points, seed=seed)),
                    dropped=1 - asked[policy] / top_k,
                )
            )
    return rows


def _present(interval: Interval | None) -> Interval:
    assert interval is not None  # noqa: S101 (times are positive and finite)
    return interval


def latency_table(rows: Sequence[Latency], phase: Phase) -> str:
    """A Markdown table of the latencies of one phase."""
    lines = [
        "| policy | bandwidth | ms per token (95 %) | median | saved % (95 %) | dropped % |",
        "|---|---|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {row.policy} | {row.allocation} | {_with_interval(row.mean_ms, 3)} | {row.median_ms:.3f} | "
        f"{_with_interval(row.saved, 1, 100)} | {100 * row.dropped:.1f} |"
        for row in rows
        if row.phase == phase
    ]
    return "\n".join(lines)


def accuracy_table(rows: Sequence[Accuracy]) -> str:
    """A Markdown table of accuracies."""
    lines = ["| policy | task | right % (95 %) | points lost (95 %) | dropped % |", "|---|---|---:|---:|---:|"]
    lines += [
        f"| {row.policy} | {row.task} | {_with_interval(row.right, 1)} | {_with_interval(row.lost, 1)} | "
        f"{100 * row.dropped:.1f} |"
        for row in rows
    ]
    return "\n".join(lines)


def _with_interval(interval: Interval, digits: int, scale: float = 1.0) -> str:
    value = f"{scale * interval.value:.{digits}f}"
    if interval.low is None or interval.high is None:
        return value
    return f"{value} ({scale * interval.low:.{digits}f} to {scale * interval.high:.{digits}f})"
