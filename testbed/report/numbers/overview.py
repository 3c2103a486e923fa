"""Policies across data sets and bundles, from a run's summary: time saved, and change of accuracy. Pure."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from testbed.report.numbers.summary import ArmResult, Summary
from testbed.statistics import Interval


class Across(NamedTuple):
    """One policy with one bundle and link profile, against the baseline.

    Attributes:
        layer_wait, token: ratios of the layer wait and of the time per token; None where they were not measured.
        accuracy: differences of accuracy by workload, as shares.
        perplexity: ratios of perplexity by workload, of those that have one.
        mean: mean of the differences in `accuracy`.
    """

    bundle: str
    profile: str
    policy: str
    layer_wait: Interval | None
    token: Interval | None
    accuracy: dict[str, Interval]
    perplexity: dict[str, Interval]
    mean: Interval


def accuracy_workloads(summary: Summary) -> list[str]:
    """Workloads with right and wrong answers, in the order of the plan."""
    return list(dict.fromkeys(n for arm in summary.arms for n, r in arm.workloads.items() if "accuracy" in r.metrics))


def across(summary: Summary) -> list[Across]:
    """A row for each policy that has differences of accuracy in all workloads, in the order of the summary.

    Empty if the run has fewer than two such workloads.
    """
    workloads = accuracy_workloads(summary)
    rows = [_row(arm, workloads) for arm in summary.arms] if len(workloads) > 1 else []
    return [row for row in rows if row]


def certain_losses(row: Across) -> dict[str, Interval]:
    """The workloads whose interval lies below zero."""
    return {name: value for name, value in row.accuracy.items() if value.high is not None and value.high < 0}


def mean_of(values: Sequence[Interval]) -> Interval:
    """The mean of independent values, with an interval from theirs.

    Source: Zou and Donner 2008 (MOVER), for a sum: the distances of the limits from the values add up as squares.
    Newcombe's interval of a difference is the same for two values.
    """
    count = len(values)
    value = sum(v.value for v in values) / count
    lows = [v.value - v.low for v in values if v.low is not None]
    highs = [v.high - v.value for v in values if v.high is not None]
    units = sum(v.units for v in values)
    if len(lows) < count or len(highs) < count:
        return Interval(value, None, None, units)
    return Interval(value, value - math.hypot(*lows) / count, value + math.hypot(*highs) / count, units)


def _row(arm: ArmResult, workloads: Sequence[str]) -> Across | None:
    against = {name: result.against_baseline for name, result in arm.workloads.items()}
    accuracy = {
        name: found.difference
        for name in workloads
        if (found := against.get(name, {}).get("accuracy")) and found.difference
    }
    if len(accuracy) < len(workloads):
        return None
    times = [found for name, found in against.items() if arm.workloads[name].kind == "generate"]
    ratios = [next((t[metric].ratio for t in times if metric in t), None) for metric in ("layer_wait_ms", "token_ms")]
    perplexity = {name: found.ratio for name in workloads if (found := against[name].get("perplexity")) and found.ratio}
    return Across(
        arm.bundle, arm.profile, arm.policy, ratios[0], ratios[1], accuracy, perplexity, mean_of([*accuracy.values()])
    )
