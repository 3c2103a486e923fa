"""The section of a report that compares policies across data sets and bundles."""

from collections.abc import Sequence
from pathlib import Path

from testbed.report.numbers.metrics import METRICS
from testbed.report.numbers.overview import Across, accuracy_workloads, across, certain_losses
from testbed.report.numbers.summary import ArmResult, Summary
from testbed.report.page.document import Figure, Section, Table
from testbed.report.page.labels import NOTHING, points_text, policy_label, ratio_text, value_text

_MS = ("layer_wait_ms", "token_ms")


def overview_sections(summary: Summary, figures: Sequence[Figure]) -> list[Section]:
    """The section, if the run measured accuracy on several data sets."""
    rows = across(summary)
    if not rows:
        return []
    blocks: list[str | Table | Figure] = [
        "Times are those of generated tokens, relative to the baseline's; accuracy is the difference from the "
        "baseline's in percentage points, item by item. The baseline's row has its own values. The mean weighs all "
        "data sets equally; its interval covers these items, not other data sets."
    ]
    for bundle, profile in dict.fromkeys((arm.bundle, arm.profile) for arm in summary.arms):
        mine = [row for row in rows if (row.bundle, row.profile) == (bundle, profile)]
        arms = [arm for arm in summary.arms if (arm.bundle, arm.profile) == (bundle, profile)]
        if mine:
            blocks += [f"Bundle {Path(bundle).name}, links {profile}:", _table(summary, arms, mine)]
    return [Section("Policies across data sets and models", [*blocks, *figures, *_losses(summary, rows)])]


def _table(summary: Summary, arms: Sequence[ArmResult], rows: Sequence[Across]) -> Table:
    workloads = accuracy_workloads(summary)
    with_perplexity = [name for name in workloads if any(name in row.perplexity for row in rows)]
    header = ["policy", "layer wait", "time per token", *workloads, "mean"]
    header += [f"perplexity, {name}" for name in with_perplexity]
    lines = [_baseline(arm, workloads, with_perplexity) for arm in arms if arm.baseline]
    lines += [
        [
            _label(summary, row),
            ratio_text(row.layer_wait),
            ratio_text(row.token),
            *(points_text(row.accuracy[name]) for name in workloads),
            points_text(row.mean),
            *(ratio_text(row.perplexity.get(name)) for name in with_perplexity),
        ]
        for row in rows
    ]
    return Table(header, lines)


def _baseline(arm: ArmResult, workloads: Sequence[str], with_perplexity: Sequence[str]) -> list[str]:
    times = next((r.metrics for r in arm.workloads.values() if r.kind == "generate"), {})
    right = [arm.workloads[name].metrics.get("accuracy") for name in workloads]
    shares = [value.value for value in right if value]
    accuracy = METRICS["accuracy"]
    return [
        arm.policy,
        *(f"{value_text(times[name], METRICS[name])} ms" if name in times else NOTHING for name in _MS),
        *(f"{value_text(value, accuracy)} %" if value else NOTHING for value in right),
        f"{100 * sum(shares) / len(shares):.1f} %" if len(shares) == len(right) else NOTHING,
        *(value_text(arm.workloads[name].metrics.get("perplexity"), METRICS["perplexity"]) for name in with_perplexity),
    ]


def _label(summary: Summary, row: Across) -> str:
    """The policy's label among those of its bundle."""
    return policy_label(row.policy, (arm.policy for arm in summary.arms if arm.bundle == row.bundle))


def _losses(summary: Summary, rows: Sequence[Across]) -> list[str | Table | Figure]:
    found = [
        [Path(row.bundle).name, row.profile, _label(summary, row), name, points_text(value)]
        for row in rows
        for name, value in certain_losses(row).items()
    ]
    count = sum(len(row.accuracy) for row in rows)
    if not found:
        return [f"None of the {count} differences has an interval that lies below zero."]
    return [
        f"Where a policy costs accuracy: {len(found)} of {count} differences have an interval that lies below zero. If "
        f"no policy cost anything, about {0.025 * count:.0f} would be expected.",
        Table(("bundle", "links", "policy", "data set", "points"), found, 4),
    ]
