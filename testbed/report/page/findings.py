"""A run in two or three sentences: what was measured, which policy was fastest, and what it costs in quality. Pure."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from testbed.plan.schema import Plan
from testbed.report.numbers.overview import mean_of
from testbed.report.numbers.summary import ArmResult, Summary, WorkloadResult
from testbed.report.page.labels import points_text, policy_label, ratio_text
from testbed.statistics import Interval

_KINDS = {"generate": "answers", "choice": "items", "last-word": "texts", "perplexity": "texts"}
_TIMES = ("token_ms", "layer_wait_ms")
_CALLED = {"token_ms": "time per token", "layer_wait_ms": "layer wait"}


class _Ratio(NamedTuple):
    """A policy's time relative to the baseline's, and where it was measured."""

    where: str
    interval: Interval


def findings(plan: Plan, summary: Summary) -> list[str]:
    """Two or three sentences."""
    first = _what_was_run(plan, summary)
    if all(arm.baseline for arm in summary.arms):
        return [first, "There is no other policy to compare it with."]
    metric, ratios = _ratios(summary)
    baseline = _label(summary, summary.baseline)
    if not ratios:
        return [first, f"No times were measured on nodes that could be compared with those of {baseline}."]
    best = min(ratios, key=lambda policy: sum(math.log(r.interval.value) for r in ratios[policy]) / len(ratios[policy]))
    return [first, _time(summary, best, metric, ratios[best], others=len(ratios) > 1), _quality(summary, best)]


def _what_was_run(plan: Plan, summary: Summary) -> str:
    policies = [_label(summary, policy) for policy in dict.fromkeys(arm.policy for arm in summary.arms)]
    bundles = [Path(bundle).name for bundle in plan.bundles]
    count = plan.nodes if isinstance(plan.nodes, int) else len(plan.nodes)
    if plan.external:
        nodes = "nodes that were already running"
    else:
        network = "an emulated network" if plan.emulated else "the base station's loopback"
        nodes = f"{count} node processes on {network}"
    units: dict[str, int] = {}
    for name, result in max((arm.workloads for arm in summary.arms), key=_measured_units).items():
        counted = max((interval.units for interval in result.metrics.values()), default=0)
        if counted:
            units[name] = counted
    kinds = {name: result.kind for arm in summary.arms for name, result in arm.workloads.items()}
    what = _list([f"{count} {_KINDS[kinds[name]]} of {name}" for name, count in units.items()]) or "nothing yet"
    links = f", link profiles {_list(list(plan.profile_names))}" if len(plan.profile_names) > 1 else ""
    models = f"{'bundle' if len(bundles) == 1 else 'bundles'} {_list(bundles)}"
    return f"This run compared {_list(policies)} with {models} on {nodes}{links}: for each policy, {what}."


def _measured_units(workloads: Mapping[str, WorkloadResult]) -> int:
    return sum(max((i.units for i in result.metrics.values()), default=0) for result in workloads.values())


def _ratios(summary: Summary) -> tuple[str, dict[str, list[_Ratio]]]:
    """The first of `_TIMES` that was measured, and its ratios by policy; policies with fewer of them are left out."""
    for metric in _TIMES:
        found: dict[str, list[_Ratio]] = {}
        for arm in summary.arms:
            for name, result in arm.workloads.items():
                ratio = against.ratio if (against := result.against_baseline.get(metric)) else None
                if ratio and ratio.value > 0:
                    found.setdefault(arm.policy, []).append(_Ratio(_where(summary, arm, name), ratio))
        if found:
            most = max(map(len, found.values()))
            return metric, {policy: ratios for policy, ratios in found.items() if len(ratios) == most}
    return "", {}


def _time(summary: Summary, policy: str, metric: str, ratios: Sequence[_Ratio], *, others: bool) -> str:
    baseline, label, what = _label(summary, summary.baseline), _label(summary, policy), _CALLED[metric]
    ordered = sorted(ratios, key=lambda ratio: ratio.interval.value)
    texts = [f"{ratio_text(r.interval)}{r.where and f' with {r.where}'}" for r in (ordered[0], ordered[-1])]
    value = texts[0] if len(ordered) == 1 else f"between {texts[0]} and {texts[1]}"
    certain = all(r.interval.high is not None and r.interval.high < 1 for r in ordered)
    if certain:
        return f"{label} was {'the fastest' if others else 'faster'}: its {what} was {value} of that of {baseline}."
    return (
        f"No policy was certainly faster than {baseline}"
        f"{' everywhere' if len(ordered) > 1 else ''}: the {what} of {label}{', the fastest,' if others else ''} was "
        f"{value} of that of {baseline}."
    )


def _quality(summary: Summary, policy: str) -> str:
    label, baseline = _label(summary, policy), _label(summary, summary.baseline)
    points: list[Interval] = []
    losses: list[Interval] = []
    same: list[Interval] = []
    for arm in summary.arms:
        for result in arm.workloads.values() if arm.policy == policy else ():
            accuracy, perplexity = (result.against_baseline.get(name) for name in ("accuracy", "perplexity"))
            points += [accuracy.difference] if accuracy and accuracy.difference else []
            losses += [perplexity.ratio] if perplexity and perplexity.ratio else []
            same += [result.metrics["same_tokens_share"]] if "same_tokens_share" in result.metrics else []
    texts = []
    if points:
        over = f", the mean of {len(points)} measurements" if len(points) > 1 else ""
        texts.append(f"accuracy differs by {points_text(mean_of(points))} percentage points{over}")
    if losses:
        most = max(losses, key=lambda loss: loss.value)
        texts.append(f"perplexity is {'at most ' if len(losses) > 1 else ''}{ratio_text(most)}")
    if texts:
        return f"Quality of {label} against {baseline}: {_list(texts)}."
    if same:
        lowest = min(same, key=lambda share: share.value)
        return (
            f"What that costs in quality was not measured; {100 * lowest.value:.0f} % of the tokens of {label} came "
            f"before the first that differs from the answer of {baseline}."
        )
    return "What that costs in quality was not measured."


def _where(summary: Summary, arm: ArmResult, workload: str) -> str:
    several = [len({getattr(a, name) for a in summary.arms}) > 1 for name in ("bundle", "profile")]
    many = len({name for a in summary.arms for name, r in a.workloads.items() if r.kind == "generate"}) > 1
    named = (Path(arm.bundle).name if several[0] else "", arm.profile if several[1] else "", workload if many else "")
    return ", ".join(filter(None, named))


def _label(summary: Summary, policy: str) -> str:
    return policy_label(policy, (arm.policy for arm in summary.arms))


def _list(texts: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(texts[:-1]), *texts[-1:])))
