"""The plot of paired differences: each policy minus the baseline, unit by unit.

Answers and items differ more among themselves than policies do, which makes the intervals of single policies wide.
The difference on the same prompt or item does not have that spread.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes

from testbed.report.numbers.analysis import Analysis, Arm, WorkloadUnits
from testbed.report.numbers.summary import ArmResult, Summary, WorkloadResult, paired
from testbed.report.numbers.units import Key, Units
from testbed.report.page.document import Figure
from testbed.report.page.drawing import COLOURS, Row, bars, ends, grid, legend, line_style, panel_of, save, wrap
from testbed.report.page.labels import policy_label
from testbed.statistics import Float, Interval

_GAINED, _LOST = "#009E73", "#D55E00"
_MOST_POINTS = 400
"""Single differences that are drawn per policy; all are in the CSV file."""


class _Differences(NamedTuple):
    """Differences of one policy in one workload.

    Attributes:
        each: float64 [units], of each unit, in the panel's unit; NaN where one of both has no value.
        overall: of all units together, with its interval.
        gained, lost: shares of items in percent; None where units are not right or wrong.
    """

    policy: str
    keys: list[Key]
    each: Float
    overall: Interval | None
    gained: float | None = None
    lost: float | None = None


def paired_differences(analysis: Analysis, summary: Summary, folder: Path) -> list[Figure]:
    """A panel for each workload, bundle and link profile; none if the run has only one policy.

    Args:
        folder: of the report; plots are in `plots` below it.
    """
    panels: dict[tuple[str, str], list[_Differences]] = {}
    rows: list[Row] = []
    for result in summary.arms:
        arm = Arm(result.bundle, result.profile, result.policy)
        for name, workload in result.workloads.items():
            mine = analysis.units.get(arm, {}).get(name)
            theirs = analysis.units.get(arm._replace(policy=summary.baseline), {}).get(name)
            if result.baseline or mine is None or theirs is None:
                continue
            what, found = _differences(result, workload, mine, theirs)
            if len(found.keys):
                panels.setdefault((panel_of(summary, result, name), what), []).append(found)
                each = zip(found.keys, found.each, strict=True)
                rows += [(*arm, name, what, *key, value, "", "") for key, value in each if np.isfinite(value)]
                rows += [(*arm, name, what, "", "all", *ends(found.overall))] if found.overall else []
    if not panels:
        return []
    policies = [arm.policy for arm in summary.arms]
    figure, axes = grid(len(panels), height=1.2 + 0.42 * max(map(len, panels.values())))
    for axis, ((title, what), found_ones) in zip(axes, panels.items(), strict=True):
        _draw(axis, found_ones, list(dict.fromkeys(policies)))
        axis.set(title=title, xlabel=what)
    legend(figure, axes)
    baseline = policy_label(summary.baseline, policies)
    caption = (
        f"Each policy minus {baseline}, on the same prompts, items or texts; left of zero is less. Dots are single "
        "answers or texts, diamonds all of them together with 95 % intervals. For items, the bars show how many only "
        f"this policy and only {baseline} got right. A difference that the intervals of single policies hide can show."
    )
    header = ("bundle", "profile", "policy", "workload", "what", "repetition", "number", "difference", "low", "high")
    return [save(figure, folder, "paired", header, rows, caption)]


def _differences(
    arm: ArmResult, result: WorkloadResult, mine: WorkloadUnits, theirs: WorkloadUnits
) -> tuple[str, _Differences]:
    """What the differences are of, with its unit; and the differences."""
    against = result.against_baseline
    if result.kind == "generate":
        some, others = paired(mine.steps, theirs.steps)
        each = _per(some, "total_ns", "tokens") / 1e6 - _per(others, "total_ns", "tokens") / 1e6
        overall = against["token_ms"].difference if "token_ms" in against else None
        return "time per token, difference in ms", _Differences(arm.policy, some.keys, each, overall)
    some, others = paired(mine.items, theirs.items)
    if result.kind == "perplexity":
        each = _per(some, "loss_nats", "predicted_tokens") - _per(others, "loss_nats", "predicted_tokens")
        ratio = against["perplexity"].ratio if "perplexity" in against else None
        return "loss, difference in nats per token", _Differences(arm.policy, some.keys, each, _log(ratio))
    each = 100 * (_per(some, "right", "items") - _per(others, "right", "items"))
    overall = against["accuracy"].difference if "accuracy" in against else None
    gained, lost = (float(np.maximum(sign * each, 0).sum() / max(1, len(each))) for sign in (1, -1))
    in_points = _scaled(overall, 100) if overall else None
    return "accuracy, difference in points", _Differences(arm.policy, some.keys, each, in_points, gained, lost)


def _draw(axis: Axes, found: Sequence[_Differences], policies: Sequence[str]) -> None:
    axis.axvline(0, color="#666666", linewidth=0.9)
    for line, differences in enumerate(found):
        colour = line_style(policies, differences.policy)["color"]
        if differences.gained is None or differences.lost is None:
            drawn = differences.each[np.isfinite(differences.each)]
            step = max(1, -(-len(drawn) // _MOST_POINTS))
            points = np.sort(drawn)[::step]
            # Spread over the line's height by rank, so that equal values stay apart.
            height = line + 0.5 * (np.linspace(0, 1, len(points)) - 0.5 if len(points) > 1 else np.zeros(len(points)))
            axis.plot(points, height, linestyle="", marker=".", markersize=5, color=colour, alpha=0.6, zorder=2)
        else:
            style: Any = {"height": 0.5, "alpha": 0.45, "linewidth": 0, "zorder": 2}
            axis.barh(line, differences.gained, color=_GAINED, label=_named("this policy", differences.gained), **style)
            axis.barh(line, -differences.lost, color=_LOST, label=_named("the baseline", differences.lost), **style)
        if (overall := differences.overall) is not None:
            axis.errorbar(
                overall.value, line, xerr=bars(overall, 1), capsize=3, elinewidth=1.4, marker="D", markersize=5,
                linestyle="", color=COLOURS[0], label="all together", zorder=3,
            )  # fmt: skip
    axis.set_yticks(range(len(found)), [wrap(policy_label(d.policy, policies), 24) for d in found])
    axis.set_ylim(len(found) - 0.4, -0.6)
    axis.grid(visible=False, axis="y")


def _named(policy: str, share: float) -> str:
    """Label of a bar; hidden from the legend if the bar has no width."""
    return f"right only with {policy}" if share else "_nothing"


def _per(units: Units, part: str, whole: str) -> Float:
    """Part per whole of each unit, NaN where the whole is zero."""
    parts, wholes = units.sum(part), units.sum(whole)
    value: Float = np.divide(parts, wholes, out=np.full(len(parts), np.nan), where=wholes > 0)
    return value


def _scaled(interval: Interval, scale: float) -> Interval:
    limits = [None if limit is None else scale * limit for limit in (interval.low, interval.high)]
    return Interval(scale * interval.value, limits[0], limits[1], interval.units)


def _log(ratio: Interval | None) -> Interval | None:
    """The difference of mean losses, from the ratio of the perplexities: e to the power of these."""
    if ratio is None or ratio.value <= 0:
        return None
    low, high = (math.log(limit) if limit else None for limit in (ratio.low, ratio.high))
    return Interval(math.log(ratio.value), low, high, ratio.units)
