"""The text and tables of a report, from the numbers of its summary and the drawn figures."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from testbed.report.numbers.metrics import METRICS, PART_METRICS, SAME_TOKENS, TOKEN_METRICS, Metric
from testbed.report.numbers.summary import Against, ArmResult, Summary, WorkloadResult
from testbed.report.page.document import Document, Figure, Section, Table
from testbed.report.page.findings import findings
from testbed.report.page.labels import NOTHING, points_text, policy_label, ratio_text, value_text
from testbed.report.page.overview import overview_sections
from testbed.report.page.session import clock, session_sections
from testbed.run_directory.directory import RunDir
from testbed.statistics import LEAST_UNITS

_NO_CELL = "No cell of this workload is complete yet."
_QUALITY = ("accuracy", "perplexity", "dropped_share", "layer_wait_ms", "predicted_layer_wait_ms")
_SENT = (
    "dropped_share", "requests_per_layer", "bytes_per_token", "probe_bytes_per_token", "probe_share",
    "predicted_layer_wait_ms", "prediction_error",
)  # fmt: skip
_COMPARED = ("token_ms", "token_p95_ms", "layer_wait_ms", "bytes_per_token")


def contents(run: RunDir, summary: Summary, figures: dict[str, list[Figure]]) -> Document:
    """The whole report.

    Args:
        figures: plots by kind, from `draw_plots`.
    """
    sections = [
        _about(run, summary),
        *overview_sections(summary, figures["overview"]),
        *_generation(summary, figures["latency"]),
        *([Section("Paired differences", [*figures["paired"]])] if figures["paired"] else []),
        *_quality(summary, figures["pareto"]),
        *_links(summary, figures["links"]),
        *_probes(summary),
        *([Section("Requests by expert and node", [*figures["requests"]])] if figures["requests"] else []),
        _run_history(summary),
        *session_sections(run),
        _method(summary),
        _conditions(run),
    ]
    return Document(f"Run {summary.run}", warnings(summary), notes(summary), findings(run.plan, summary), sections)


def notes(summary: Summary) -> list[str]:
    """Conditions that a reader should know, though they make no number doubtful."""
    return [condition.text for condition in summary.conditions if not condition.severe]


def warnings(summary: Summary) -> list[str]:
    """Why the numbers are doubtful, which a reader needs to know before any of them."""
    found = []
    if not summary.complete:
        found.append(
            f"Incomplete: {summary.complete_cells} of {summary.planned_cells} cells are complete. All numbers come "
            "from these cells; policies with missing cells are compared on the units that both have."
        )
    found += [f"No result: {line}" for line in summary.without_result.values()]
    if summary.without_costs:
        found.append(
            f"{len(summary.without_costs)} in-process cells found no costs measured on nodes: in these cells, policies "
            "that use link forecasts treated all nodes alike."
        )
    found += different_code(summary.code)
    if summary.dirty:
        found.append("The code differed from its commit: the numbers can't be reproduced from the commit alone.")
    return found + [condition.text for condition in summary.conditions if condition.severe]


def different_code(code: Mapping[str, int]) -> list[str]:
    """A warning if cells were measured by different versions of the code.

    Args:
        code: number of cells by version.
    """
    if len(code) < 2:
        return []
    counts = ", ".join(f"{name} ({count})" for name, count in code.items())
    return [f"Cells measured by different versions: {counts}. Differences between cells may come from the code."]


def _about(run: RunDir, summary: Summary) -> Section:
    manifest = run.manifest
    kind = "an emulated network" if run.plan.emulated else "external nodes" if run.plan.external else "localhost"
    text = (
        f"{summary.complete_cells} of {summary.planned_cells} cells, {len(run.plan.every_policy)} policies over "
        f"{kind}, broker {manifest.broker}, started {summary.created}, commit {summary.commit[:12]}. Policies are "
        f"compared with {_label(summary, summary.baseline)}. Intervals are 95 % confidence intervals; see Method."
    )
    shortened = [policy for policy in run.plan.every_policy if _label(summary, policy) != policy]
    if shortened:
        text += " Policies with their options: " + ", ".join(f"`{policy}`" for policy in shortened) + "."
    return Section("What was run", [text])


def _generation(summary: Summary, figures: Sequence[Figure]) -> list[Section]:
    sections = []
    for name in _workloads(summary, "generate"):
        results = _results(summary, name)
        if not any(result.cells for _, result in results):
            sections.append(Section(f"Latency: {name}", [_NO_CELL]))
            continue
        blocks: list[str | Table | Figure] = [
            "Times of generated tokens after the first of each answer, on the base station's clock. Layer wait is the "
            "time from the choice of a layer's experts to their combined output.",
            _metric_table(summary, results, [*TOKEN_METRICS, METRICS["layer_wait_ms"]]),
            f"Relative to {_label(summary, summary.baseline)}, paired by prompt and repetition:",
            _against_table(summary, results),
            "Requests and bytes. Dropped pairs are (token, expert) pairs of plain top-k that the policy left out; "
            "probes are not part of KiB/token:",
            _metric_table(summary, results, [*(METRICS[m] for m in _SENT), SAME_TOKENS]),
            "Time per token along the critical path:",
            _metric_table(summary, results, PART_METRICS),
        ]
        sections.append(Section(f"Latency: {name}", blocks))
    if sections and figures:
        sections.append(Section("Latency plots", [*figures]))
    return sections


def _quality(summary: Summary, figures: Sequence[Figure]) -> list[Section]:
    sections = []
    for kind, title in (("choice", "Accuracy"), ("last-word", "Last words"), ("perplexity", "Perplexity")):
        for name in _workloads(summary, kind):
            results = _results(summary, name)
            if not any(result.cells for _, result in results):
                sections.append(Section(f"{title}: {name}", [_NO_CELL]))
                continue
            table = _metric_table(summary, results, [METRICS[m] for m in _QUALITY])
            rows = []
            for arm, result in results:
                if result.against_baseline:
                    rows.append([*_labels(summary, arm), *_quality_change(kind, result)])
            where = "on the nodes" if results[0][1].where == "distributed" else "in one process with all experts"
            blocks: list[str | Table | Figure] = [f"Evaluated {where}.", table]
            if rows:
                changes = [
                    "difference, percentage points",
                    "right only with this policy",
                    f"right only with {_label(summary, summary.baseline)}",
                ]
                header = [] if kind == "perplexity" else changes
                header += [] if kind == "choice" else ["perplexity, ratio"]
                blocks += [
                    f"Relative to {_label(summary, summary.baseline)}, item by item:",
                    Table([*_label_names(summary), *header], rows, _label_count(summary)),
                ]
            sections.append(Section(f"{title}: {name}", blocks))
    if figures:
        sections.append(Section("Accuracy versus latency", [*figures]))
    return sections


def _quality_change(kind: str, result: WorkloadResult) -> list[str]:
    cells: list[str] = []
    if kind != "perplexity":
        against = result.against_baseline.get("accuracy")
        points = points_text(against.difference) if against else NOTHING
        cells += [points, str(result.items_gained), str(result.items_lost)]
    if kind != "choice":
        against = result.against_baseline.get("perplexity")
        cells.append(ratio_text(against.ratio) if against else NOTHING)
    return cells


def _links(summary: Summary, figures: Sequence[Figure]) -> list[Section]:
    if not figures and not summary.links:
        return []
    blocks: list[str | Table | Figure] = []
    if summary.links:
        rows = [
            [e.profile, e.node, e.quantity, f"{e.truth:.1f}", f"{100 * e.error_share:.1f}", str(e.samples)]
            for e in summary.links
        ]
        header = ("profile", "node", "quantity", "configured (median)", "median error, %", "samples")
        blocks.append(Table(header, rows, 3))
    title = "Links: estimated and configured" if summary.links else "Links as estimated"
    return [Section(title, [*blocks, *figures])]


def _probes(summary: Summary) -> list[Section]:
    if not summary.probes:
        return []
    probes, frames = (sum(getattr(p, name) for p in summary.probes) for name in ("probe_bytes", "frame_bytes"))
    text = (
        f"{100 * probes / max(1, probes + frames):.1f} % of the bytes on all links were probes of the links. Refused "
        "probes did not fit into their budget, so the estimate of that link grew less certain."
    )
    rows = []
    for p in summary.probes:
        numbers = f"{p.probe_bytes / 1024:.0f}", f"{p.frame_bytes / 1024:.0f}", f"{100 * p.share:.1f}", str(p.refused)
        rows.append([p.profile, p.node, *numbers])
    header = ("profile", "node", "probes, KiB", "requests and answers, KiB", "probes, %", "refused")
    return [Section("Probes", [text, Table(header, rows, 2)])]


def _run_history(summary: Summary) -> Section:
    blocks: list[str | Table | Figure] = []
    if summary.failures:
        rows = [[clock(f["unix_ns"]), f["what"], f["kind"], f["error"], str(f["attempt"])] for f in summary.failures]
        blocks += [
            f"{len(rows)} attempts at cells failed:",
            Table(("time", "cell", "error", "message", "attempt"), rows, 4),
        ]
    else:
        blocks.append("No attempt at a cell failed.")
    if summary.gaps:
        rows = [[clock(g["unix_ns"]), g["after"], f"{g['gap_s']:.0f}", str(g["lost"])] for g in summary.gaps]
        header = ("resumed", "last event before", "gap, s", "unfinished cells discarded")
        blocks += ["The run was interrupted and resumed:", Table(header, rows, 2)]
    else:
        blocks.append("The run was not interrupted.")
    if summary.logger:
        cost = summary.logger
        blocks.append(
            f"Logging took {cost.log_us_per_token:.1f} µs per token or step during the measurement "
            f"({100 * cost.share:.3f} % of the measured time), and {cost.write_s:.2f} s for writing files between "
            f"cells."
        )
    return Section("Failures, gaps and the cost of logging", blocks)


def _method(summary: Summary) -> Section:
    method = summary.method
    return Section(
        "Method",
        [
            f"Intervals are percentile bootstraps ({method['resamples']} resamples, seed {method['seed']}). They "
            "resample whole answers, batches or texts, because the tokens of one answer are not independent, and are "
            "widened by t(n − 1) / 1.96 × √(n / (n − 1)) for n units. A mean is the total time over the total number "
            "of tokens of the resampled units. Comparisons resample the same units for both policies. Accuracy has "
            "Wilson's interval; differences of accuracy have Bonett and Price's interval on the same items and "
            "Newcombe's on different items. Quantiles are by nearest rank. A p95 needs at least 129 tokens, an "
            f"interval at least {LEAST_UNITS} units, and an interval of a p95 at least 59. The warm-up before each "
            "cell is excluded from all numbers. n is the number of answers, items or texts; shares and times of "
            "multiple choice are resampled by batch.",
            "Intervals apply to these prompts and items on this machine. They don't cover conditions that did not vary "
            "between repetitions.",
        ],
    )


def _conditions(run: RunDir) -> Section:
    manifest = run.manifest
    facts = [
        ("machine", manifest.machine),
        ("power", manifest.power),
        ("wifi", manifest.wifi),
        ("versions", manifest.versions),
    ]
    rows = [[name, ", ".join(f"{k} {v}" for k, v in values.items()) or NOTHING] for name, values in facts]
    rows += [
        [f"bundle {b.name}", f"{b.quantisation}, model {b.model_sha256}, manifest {b.manifest_sha256}"]
        for b in manifest.bundles
    ]
    rows += [[f"data {Path(path).name}", f"SHA-256 {sha}"] for path, sha in manifest.datasets.items()]
    rows.append(["command", " ".join(["wdmoe-testbed", *manifest.argv[1:]])])
    rows.append(["plan", msgspec.json.encode(run.plan).decode()])
    return Section("Conditions", [Table(("fact", "value"), rows, 2)])


def _metric_table(
    summary: Summary, results: list[tuple[ArmResult, WorkloadResult]], metrics: Sequence[Metric]
) -> Table:
    """One row per arm and one column per metric that any arm has."""
    shown = [m for m in metrics if any(m.name in result.metrics for _, result in results)]
    rows = [
        [*_labels(summary, arm), *(value_text(result.metrics.get(m.name), m) for m in shown), _units(result)]
        for arm, result in results
    ]
    return Table([*_label_names(summary), *(m.title for m in shown), "n"], rows, _label_count(summary))


def _against_table(summary: Summary, results: list[tuple[ArmResult, WorkloadResult]]) -> Table:
    rows = []
    shown = [name for name in _COMPARED if any(name in result.against_baseline for _, result in results)]
    for arm, result in results:
        if not arm.baseline:
            found: list[Against | None] = [result.against_baseline.get(name) for name in shown]
            rows.append([*_labels(summary, arm), *(ratio_text(a.ratio) if a else NOTHING for a in found)])
    header = [*_label_names(summary), *(METRICS[name].title.partition(",")[0] for name in shown)]
    return Table(header, rows, _label_count(summary))


def _units(result: WorkloadResult) -> str:
    """Largest number of answers or items that an interval of the row is based on."""
    counts = [interval.units for interval in result.metrics.values()]
    return str(max(counts, default=0))


def _workloads(summary: Summary, kind: str) -> list[str]:
    return list(dict.fromkeys(n for arm in summary.arms for n, r in arm.workloads.items() if r.kind == kind))


def _results(summary: Summary, workload: str) -> list[tuple[ArmResult, WorkloadResult]]:
    return [(arm, arm.workloads[workload]) for arm in summary.arms]


def _label_names(summary: Summary) -> list[str]:
    """Columns that distinguish the arms; coordinates that all arms share are left out."""
    several = [f for f in ("bundle", "profile") if len({getattr(arm, f) for arm in summary.arms}) > 1]
    return [*several, "policy"]


def _labels(summary: Summary, arm: ArmResult) -> list[str]:
    values = {"bundle": Path(arm.bundle).name, "profile": arm.profile, "policy": _label(summary, arm.policy)}
    return [values[name] for name in _label_names(summary)]


def _label(summary: Summary, policy: str) -> str:
    return policy_label(policy, (arm.policy for arm in summary.arms))


def _label_count(summary: Summary) -> int:
    return len(_label_names(summary))
