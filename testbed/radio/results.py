"""From replayed draws to the table: mean latencies with intervals, drop rates, accuracy. Pure."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bs_coordinator.bandwidth import Float
from bs_coordinator.selection import parse_policy
from testbed.radio.replay import ALLOCATIONS, PHASES, Allocation, Phase, batch_seconds, batches, replay
from testbed.radio.setting import Cell
from testbed.radio.traces import RoutingTrace
from testbed.report.statistics import Interval, Ratio, difference, measured, ratio

VANILLA = "topk"


@dataclass(frozen=True, slots=True)
class Latency:
    """One policy with one allocation.

    Attributes:
        mean_ms: per token, all tokens of all draws counted alike.
        median_ms: per token, over draws.
        saved: share of the time of top-k with equal shares, on the same draws.
        dropped: share of top-k's (token, expert) pairs that were not asked.
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
    """One policy's answers to one task, under the simulated links.

    Attributes:
        right: share of the items.
        lost: points less than top-k on the same items.
        dropped: share of top-k's (token, expert) pairs that were not asked.
    """

    task: str
    policy: str
    right: Interval
    lost: Interval
    dropped: float


def compare_latency(
    trace: RoutingTrace,
    cell: Cell,
    policies: Sequence[str],
    *,
    seed: int,
    phases: Iterable[Phase] = PHASES,
    allocations: Iterable[Allocation] = ALLOCATIONS,
) -> list[Latency]:
    """Replay a trace under each policy with each allocation, all on the same draws.

    Args:
        policies: as `parse_policy` takes them.
        seed: of the tokens that decoding takes, and of the intervals.

    Raises:
        SimulationError: the trace does not fit the cell.
        ValueError: a policy is unknown.
    """
    found = []
    top_k = trace.facts.top_k
    for phase in phases:
        sent = batches(trace, phase, cell.draws, seed)
        tokens = np.array([len(batch) for batch in sent], np.float64)
        vanilla_rows = replay(parse_policy(VANILLA, top_k=top_k), sent, cell)
        vanilla = _per_token_ms(cell, vanilla_rows, "uniform", tokens)
        for policy in policies:
            rows = replay(parse_policy(policy, top_k=top_k, model_sha256=trace.facts.model_sha256), sent, cell)
            for allocation in allocations:
                time_ms = _per_token_ms(cell, rows, allocation, tokens)
                found.append(
                    Latency(
                        phase=phase,
                        policy=policy,
                        allocation=allocation,
                        mean_ms=_present(measured(time_ms, seed=seed)),
                        median_ms=float(np.median(time_ms.part / tokens) * time_ms.scale),
                        saved=_saved(_present(ratio(time_ms, vanilla, seed=seed))),
                        dropped=float(1 - rows.sum() / vanilla_rows.sum()),
                    )
                )
    return found


def compare_accuracy(
    right: dict[str, dict[str, NDArray[np.bool_]]], asked: dict[str, float], top_k: int, *, seed: int
) -> list[Accuracy]:
    """Accuracy of each policy and how far it falls behind top-k.

    Args:
        right: by policy and task, bool [items], whether each item was answered right; top-k is among the policies.
        asked: by policy, experts per token and layer.
    """
    rows = []
    for policy, tasks in right.items():
        for task, marks in tasks.items():
            points, of_vanilla = (
                Ratio(m.astype(np.float64), np.ones(len(m)), 100.0) for m in (marks, right[VANILLA][task])
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


def _per_token_ms(cell: Cell, rows: Float, allocation: Allocation, tokens: Float) -> Ratio:
    return Ratio(batch_seconds(cell, rows, allocation), tokens, 1e3)


def _saved(left: Interval) -> Interval:
    low, high = (None if x is None else 1 - x for x in (left.high, left.low))
    return Interval(1 - left.value, low, high, left.units)


def _present(interval: Interval | None) -> Interval:
    assert interval is not None  # noqa: S101 (times are positive and finite)
    return interval


def latency_table(rows: Sequence[Latency], phase: Phase) -> str:
    """Markdown."""
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
    """Markdown."""
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
