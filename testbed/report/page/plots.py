"""Plots of a run, each as PNG and SVG with a CSV file of its data."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from testbed.plan.schema import Generate, Items, Plan
from testbed.report.numbers.analysis import Analysis
from testbed.report.numbers.link_errors import LinkSeries, link_series, profile_of
from testbed.report.numbers.metrics import PARTS
from testbed.report.numbers.overview import across
from testbed.report.numbers.summary import ArmResult, Summary
from testbed.report.page.document import Figure
from testbed.report.page.drawing import (
    COLOURS,
    MARKERS,
    STYLE,
    Row,
    bars,
    ends,
    grid,
    legend,
    line_style,
    panel_of,
    save,
    wrap,
)
from testbed.report.page.labels import policy_label
from testbed.report.page.paired_plot import paired_differences
from testbed.statistics import Interval

LINK_QUANTITIES = {"down_mbps": "down-link, Mbit/s", "up_mbps": "up-link, Mbit/s", "rtt_ms": "round trip, ms"}
NODES_DRAWN = 8
"""Most nodes in one plot of links, to keep it readable."""
_MOST_TICKS = 64
_MOST_DRAWN = 512
"""Most nodes and experts of a heat map; the limit of an image is 65,536 pixels."""
_USUAL = 0.97
"""Share of estimates that fit into the axes of link plots."""
_DEEPEST_POINTS = 15
"""Largest loss of accuracy that is drawn."""


def draw_plots(analysis: Analysis, summary: Summary, folder: Path) -> dict[str, list[Figure]]:
    """Draw all plots that the run has data for into `folder`/plots; returns the figures by kind."""
    (folder / "plots").mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(STYLE):
        return {
            "latency": [*_ecdf(analysis, summary, folder), *_breakdown(summary, folder)],
            "overview": _overview(summary, analysis.run.plan.every_policy, folder),
            "paired": paired_differences(analysis, summary, folder),
            "pareto": _pareto_fronts(analysis, summary, folder),
            "links": _links(analysis, folder),
            "requests": _heat_map(analysis, folder),
        }


def _ecdf(analysis: Analysis, summary: Summary, folder: Path) -> list[Figure]:
    plan = analysis.run.plan
    panels: dict[str, list[tuple[str, np.ndarray[Any, Any]]]] = {}
    rows: list[Row] = []
    for arm, workloads in analysis.units.items():
        for name, units in workloads.items():
            if isinstance(plan.workload(name), Generate) and len(units.steps):
                ms = np.sort(np.concatenate(units.steps.token_ns())) / 1e6
                panels.setdefault(panel_of(summary, arm, name), []).append((arm.policy, ms))
                rows += [(*arm, name, t, (i + 1) / len(ms)) for i, t in enumerate(ms)]
    panels = {title: [(p, ms) for p, ms in lines if len(ms)] for title, lines in panels.items()}
    if not any(panels.values()):
        return []
    figure, axes = grid(len(panels))
    longest = max(float(np.quantile(ms, 0.995)) for lines in panels.values() for _, ms in lines)
    for axis, (title, lines) in zip(axes, panels.items(), strict=True):
        for policy, ms in sorted(lines, key=lambda line: plan.every_policy.index(line[0])):
            axis.ecdf(ms, **line_style(plan.every_policy, policy))
        axis.set(title=title, xlabel="time per token, ms", ylabel="share of tokens", xlim=(0, longest * 1.03 or 1.0))
    legend(figure, axes)
    header = ("bundle", "profile", "policy", "workload", "token_ms", "share")
    caption = (
        "Cumulative distribution of the time per generated token, without the first token of each answer. The axis "
        "ends before the slowest 0.5 %."
    )
    return [save(figure, folder, "latency-ecdf", header, rows, caption)]


def _breakdown(summary: Summary, folder: Path) -> list[Figure]:
    panels: dict[str, list[tuple[str, list[float]]]] = {}
    rows: list[Row] = []
    for arm in summary.arms:
        for name, result in arm.workloads.items():
            parts = [result.metrics[f"{part}_ms"].value for part in PARTS if f"{part}_ms" in result.metrics]
            if len(parts) == len(PARTS):
                panels.setdefault(panel_of(summary, arm, name), []).append((arm.policy, parts))
                rows.append((arm.bundle, arm.profile, arm.policy, name, *parts))
    if not panels:
        return []
    most = max(map(len, panels.values()))
    every = [arm.policy for arm in summary.arms]
    figure, axes = grid(len(panels), height=1.1 + 0.42 * most)
    for axis, (title, arms) in zip(axes, panels.items(), strict=True):
        left = np.zeros(len(arms))
        for part, colour in zip(PARTS, ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#999999"), strict=True):
            width = np.array([parts[PARTS.index(part)] for _, parts in arms])
            label = {"compute": "node compute", "wait": "node queue"}.get(part, part)
            axis.barh(range(len(arms)), width, left=left, color=colour, label=label, edgecolor="white", linewidth=0.5)
            left += width
        axis.set_yticks(range(len(arms)), [wrap(policy_label(p, every), 24) for p, _ in arms])
        axis.invert_yaxis()
        axis.set(title=title, xlabel="mean time per token, ms")
        axis.grid(visible=False, axis="y")
    legend(figure, axes)
    header = ("bundle", "profile", "policy", "workload", *(f"{part}_ms" for part in PARTS))
    caption = (
        "Mean time per token along the critical path: the trunk on the base station; network, node compute and node "
        "queue of each layer's slowest request; framing is the rest."
    )
    return [save(figure, folder, "breakdown", header, rows, caption)]


def _overview(summary: Summary, policies: Sequence[str], folder: Path) -> list[Figure]:
    rows = [row for row in across(summary) if row.layer_wait]
    panels = list(dict.fromkeys((row.bundle, row.profile) for row in rows))
    if not panels:
        return []
    figure, axes = grid(len(panels), columns=len({profile for _, profile in panels}))
    lines: list[Row] = []
    for axis, panel in zip(axes, panels, strict=True):
        axis.axhline(0, color="#999999", linewidth=0.8)
        for row in rows:
            wait = row.layer_wait
            if (row.bundle, row.profile) != panel or wait is None:
                continue
            style = line_style(policies, row.policy)
            axis.errorbar(
                wait.value, 100 * row.mean.value, xerr=bars(wait, 1), yerr=bars(row.mean, 100), capsize=2,
                elinewidth=0.8, marker=MARKERS[policies.index(row.policy) % len(MARKERS)], markersize=7, linestyle="",
                color=style["color"], label=style["label"],
            )  # fmt: skip
            points = [100 * value.value for value in row.accuracy.values()]
            axis.plot([wait.value] * len(points), points, linestyle="", marker="_", color=style["color"], alpha=0.6)
            limits = [(name, *ends(value)) for name, value in (*row.accuracy.items(), ("mean", row.mean))]
            lines += [(*panel, row.policy, *ends(wait), *end) for end in limits]
        # A policy that breaks a model must not flatten the others.
        axis.set_ylim(bottom=max(axis.get_ylim()[0], -_DEEPEST_POINTS))
        title = wrap(f"{Path(panel[0]).name}, {panel[1]}", 44)
        axis.set(title=title, xlabel="layer wait, relative to the baseline", ylabel="accuracy, difference in points")
    legend(figure, axes)
    header = ("bundle", "profile", "policy", "layer_wait_ratio", "low", "high", "workload", "accuracy_difference")
    caption = (
        "Accuracy against layer wait, both relative to the baseline: means over all data sets with 95 % intervals; "
        f"dashes are the single data sets. Losses beyond {_DEEPEST_POINTS} points lie below the plot. Up and to the "
        "left is better."
    )
    return [save(figure, folder, "overview", (*header, "low", "high"), lines, caption)]


def _pareto_fronts(analysis: Analysis, summary: Summary, folder: Path) -> list[Figure]:
    choices = [w for w in analysis.run.plan.workloads if isinstance(w, Items)]
    figures = []
    for metric in ("token_ms", "layer_wait_ms"):
        panels: dict[str, list[tuple[str, Interval, Interval]]] = {}
        rows: list[Row] = []
        for arm in summary.arms:
            for choice in choices:
                cost = _cost(arm, choice, analysis.run.plan, metric)
                right = arm.workloads[choice.name].metrics.get("accuracy")
                if cost and right:
                    panels.setdefault(panel_of(summary, arm, choice.name), []).append((arm.policy, cost, right))
                    rows.append((arm.bundle, arm.profile, arm.policy, choice.name, *ends(cost), *ends(right)))
        if panels:
            figures.append(_pareto_front(analysis, folder, metric, panels, rows))
    return figures


def _cost(arm: ArmResult, choice: Items, plan: Plan, metric: str) -> Interval | None:
    """A time per token that matches how the tokens of `choice` chose their experts.

    For a workload on nodes, it is the workload's own time. For one in this process whose tokens chose together, it is
    the time of equal batches on nodes, if the plan has them; else it is the time of generated tokens.
    """
    if choice.where == "distributed":
        return arm.workloads[choice.name].metrics.get(metric)
    batches = [
        w.name for w in plan.workloads if isinstance(w, Items) and w.where == "distributed" and w.batch == choice.batch
    ]
    if choice.choosing == "together" and batches:
        return arm.workloads[batches[0]].metrics.get(metric)
    times = (arm.workloads[w.name].metrics.get(metric) for w in plan.workloads if isinstance(w, Generate))
    return next((time for time in times if time), None)


def _pareto_front(
    analysis: Analysis,
    folder: Path,
    metric: str,
    panels: dict[str, list[tuple[str, Interval, Interval]]],
    rows: list[Row],
) -> Figure:
    choices = sum(isinstance(w, Items) for w in analysis.run.plan.workloads)
    figure, axes = grid(len(panels), columns=choices if choices > 1 else 3)
    policies = analysis.run.plan.every_policy
    what = {"token_ms": "mean time per token, ms", "layer_wait_ms": "mean layer wait, ms"}[metric]
    for axis, (title, points) in zip(axes, panels.items(), strict=True):
        for policy, cost, right in points:
            style = line_style(policies, policy)
            axis.errorbar(
                cost.value, 100 * right.value, xerr=bars(cost, 1), yerr=bars(right, 100), capsize=2, elinewidth=0.8,
                marker=MARKERS[policies.index(policy) % len(MARKERS)], markersize=6, linestyle="",
                color=style["color"], label=style["label"],
            )  # fmt: skip
        axis.set(title=title, xlabel=what, ylabel="accuracy, %")
    legend(figure, axes)
    header = ("bundle", "profile", "policy", "workload", metric, "low", "high", "accuracy", "low", "high")
    caption = (
        f"Accuracy against {what.removesuffix(', ms')} with 95 % intervals; up and to the left is better. Where tokens "
        "chose their experts together, times are those of equal batches on nodes if the plan has them; otherwise they "
        "are those of generated tokens."
    )
    return save(figure, folder, f"front-{metric.removesuffix('_ms').replace('_', '-')}", header, rows, caption)


def _links(analysis: Analysis, folder: Path) -> list[Figure]:
    figures = []
    for profile in analysis.run.plan.profile_names:
        series = link_series([cell for cell in analysis.links if profile_of(cell) == profile])
        if any(s.quantity in LINK_QUANTITIES for s in series):
            figures.append(_links_of(profile, series, folder))
    return figures


def _links_of(profile: str, series: Sequence[LinkSeries], folder: Path) -> Figure:
    all_nodes = sorted({s.node for s in series}, key=lambda n: (len(n), n))
    nodes = all_nodes[:NODES_DRAWN]
    # The CSV file has all quantities; drawn are those that both estimates and networks have.
    quantities = [q for q in LINK_QUANTITIES if any(s.quantity == q for s in series)]
    figure = Canvas(figsize=(3.4 * len(quantities) + 0.6, 1.5 * len(nodes) + 1.0), layout="constrained")
    axes = figure.subplots(len(nodes), len(quantities), squeeze=False, sharex=True)
    rows: list[Row] = []
    for s in series:
        for kind, samples in (("truth", s.truth), ("estimate", s.estimate)):
            drawn = zip(samples.s, samples.value, strict=True)
            rows += [(profile, s.node, s.quantity, kind, t, v) for t, v in drawn if np.isfinite(v)]
        if s.node in nodes and s.quantity in quantities:
            _link(axes[nodes.index(s.node)][quantities.index(s.quantity)], s)
    for column, quantity in enumerate(quantities):
        axes[0][column].set_title(LINK_QUANTITIES[quantity])
        axes[-1][column].set_xlabel("measurement time, s")
    for row, node in enumerate(nodes):
        axes[row][0].set_ylabel(node)
    figure.align_ylabels(axes[:, 0])
    legend(figure, axes.flatten().tolist())
    what = "configured and estimated" if any(len(s.truth.s) for s in series) else "estimated"
    caption = (
        f"Links of profile {profile}, {what}; bands are two standard deviations. Pauses between cells are left out. "
        f"The axes show {100 * _USUAL:.0f} % of the estimates."
    )
    if hidden := len(all_nodes) - len(nodes):
        caption += f" {hidden} more nodes are only in the CSV file."
    header = ("profile", "node", "quantity", "kind", "time_s", "value")
    return save(figure, folder, f"links-{profile}", header, rows, caption)


def _link(axis: Axes, s: LinkSeries) -> None:
    if len(s.truth.s):  # only emulated networks know it
        axis.step(
            s.truth.s, s.truth.value, where="post", color=COLOURS[0], linewidth=1.5, label="configured", zorder=3
        )  # fmt: skip
    marker = "." if len(s.estimate.s) < 100 else ""
    axis.plot(
        s.estimate.s, s.estimate.value, color=COLOURS[4], linewidth=0.9, marker=marker, markersize=3, label="estimate"
    )  # fmt: skip
    if s.std is not None:
        low, high = np.maximum(0, s.estimate.value - 2 * s.std), s.estimate.value + 2 * s.std
        axis.fill_between(s.estimate.s, low, high, color=COLOURS[4], alpha=0.15, linewidth=0)
    # The first estimates of a link may be far off; they must not flatten the rest of the curve.
    seen, known = (values[np.isfinite(values)] for values in (s.estimate.value, s.truth.value))
    usual = float(np.quantile(seen, _USUAL)) if len(seen) else 0.0
    axis.set_ylim(0, 1.3 * max(usual, float(known.max(initial=0.0))) or 1.0)


def _heat_map(analysis: Analysis, folder: Path) -> list[Figure]:
    counts = {p: analysis.requests[p] for p in analysis.run.plan.every_policy if analysis.requests.get(p)}
    if not counts:
        return []
    every_node = sorted({node for counter in counts.values() for _, node in counter}, key=lambda n: (len(n), n))
    highest = max(expert for counter in counts.values() for expert, _ in counter) + 1
    nodes, experts = every_node[:_MOST_DRAWN], min(highest, _MOST_DRAWN)
    shown = {*nodes}
    figure, axes = grid(len(counts), width=1.6 + 0.42 * len(nodes), height=1.5 + 0.26 * min(experts, _MOST_TICKS))
    most = max(max(counter.values()) for counter in counts.values())
    rows: list[Row] = []
    image = None
    for axis, (policy, counter) in zip(axes, counts.items(), strict=True):
        counts_of = np.array([[counter[e, node] for node in nodes] for e in range(experts)], float)
        rows += [(policy, e, node, counter[e, node]) for e in range(experts) for node in nodes]
        hidden = sorted((e, node) for e, node in counter if e >= experts or node not in shown)
        rows += [(policy, e, node, counter[e, node]) for e, node in hidden]
        image = axis.imshow(
            np.where(counts_of > 0, counts_of, np.nan), cmap="cividis", vmin=0, vmax=most, aspect="auto"
        )
        axis.set_xticks(range(len(nodes)), nodes, rotation=45, ha="right")
        if experts <= _MOST_TICKS:
            axis.set_yticks(range(experts))
        axis.set(title=wrap(policy_label(policy, counts), 30), ylabel="expert")
        axis.grid(visible=False)
    assert image is not None  # noqa: S101 (there is a policy)
    figure.colorbar(image, ax=axes, label="requests", shrink=0.9)
    caption = "Number of requests to each node for each expert index, summed over all layers; white means none."
    if max(len(every_node), highest) > _MOST_DRAWN:
        caption += f" Beyond {_MOST_DRAWN} nodes or experts, they are only in the CSV file."
    return [save(figure, folder, "requests", ("policy", "expert", "node", "requests"), rows, caption)]
