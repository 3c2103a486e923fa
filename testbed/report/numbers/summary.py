"""The numbers of a run, as in `summary.json`."""

from typing import Any

import msgspec
from msgspec import Struct

from testbed.plan.schema import Items, Workload
from testbed.report.numbers.analysis import Analysis, Arm, WorkloadUnits
from testbed.report.numbers.conditions import Condition, conditions
from testbed.report.numbers.link_errors import LinkError, link_errors
from testbed.report.numbers.link_probes import LinkProbes, link_probes
from testbed.report.numbers.metrics import (
    ITEM_METRICS,
    NODE_METRICS,
    PART_METRICS,
    SAME_TOKENS,
    STEP_METRICS,
    TOKEN_METRICS,
    Metric,
    same_tokens,
)
from testbed.report.numbers.units import Units
from testbed.run_directory.directory import RunDir
from testbed.run_directory.failures import failures_and_gaps
from testbed.statistics import CONFIDENCE, RESAMPLES, Interval, difference, measured, ratio

SCHEMA = 1


class Against(Struct, frozen=True, kw_only=True):
    """A metric of a policy against that of the baseline, over the units that both have.

    Attributes:
        difference: policy minus baseline.
        ratio: policy over baseline; None if the baseline is zero.
    """

    difference: Interval | None
    ratio: Interval | None


class WorkloadResult(Struct, frozen=True, kw_only=True):
    """The results of one arm for one workload.

    Attributes:
        kind: `generate`, `choice`, `last-word` or `perplexity`.
        where: `distributed` or `in-process`.
        planned, cells: number of planned and of complete cells.
        metrics: values by metric; metrics that could not be measured are missing.
        against_baseline: comparisons by metric; empty for the baseline itself.
        items_gained: questions that are right here and wrong with the baseline.
        items_lost: questions that are wrong here and right with the baseline.
    """

    kind: str
    where: str
    planned: int
    cells: int
    metrics: dict[str, Interval]
    against_baseline: dict[str, Against] = {}
    items_gained: int | None = None
    items_lost: int | None = None


class ArmResult(Struct, frozen=True, kw_only=True):
    """The results of one arm.

    Attributes:
        baseline: whether other policies are compared with this one.
        workloads: results by workload.
    """

    policy: str
    profile: str
    bundle: str
    baseline: bool
    workloads: dict[str, WorkloadResult]


class LoggerCost(Struct, frozen=True, kw_only=True):
    """Cost of logging.

    Attributes:
        log_us_per_token: time on the hot path per token.
        share: share of all measured token time.
        write_s: time for writing files between cells.
    """

    log_us_per_token: float
    share: float
    write_s: float


class Summary(Struct, frozen=True, kw_only=True):
    """The numbers of a run.

    Attributes:
        code: number of cells by version of the code; several if the code changed before a `resume`.
        complete: whether all cells of the plan are complete.
        method: how the intervals were computed.
        failures: failed attempts at cells, in order.
        gaps: pauses of the runner.
        without_result: last error of each cell that failed and is still incomplete, by cell id.
        without_costs: cells in this process that found no measured costs, so that all nodes looked alike to policies.
        conditions: of the measurement, those that make numbers doubtful first.
    """

    schema: int
    run: str
    created: str
    commit: str
    dirty: bool
    code: dict[str, int]
    complete: bool
    planned_cells: int
    complete_cells: int
    baseline: str
    method: dict[str, Any]
    arms: list[ArmResult]
    links: list[LinkError]
    probes: list[LinkProbes]
    logger: LoggerCost | None
    failures: list[dict[str, Any]]
    gaps: list[dict[str, Any]]
    without_result: dict[str, str]
    without_costs: list[str]
    conditions: list[Condition]


def kind_of(workload: Workload) -> str:
    """The kind of a workload, as plans name it."""
    return str(type(workload).__struct_config__.tag)


def metrics_of(units: WorkloadUnits, kind: str, where: str) -> list[tuple[Metric, Units]]:
    """The metrics that a workload of this kind can have, each with the units that it is computed from."""
    steps = [*STEP_METRICS]
    if where == "distributed":
        steps += NODE_METRICS
        if kind == "generate":
            steps += [*TOKEN_METRICS, *PART_METRICS]
    return [(m, units.steps) for m in steps] + [(m, units.items) for m in ITEM_METRICS]


def summarise(analysis: Analysis, *, resamples: int = RESAMPLES) -> Summary:
    """Compute all numbers of a run; equal cells give equal numbers."""
    run = analysis.run
    manifest, plan = run.manifest, run.plan
    failures, gaps = (table.to_pylist() for table in failures_and_gaps(run))
    missing = {cell.id for cell in run.cells() if not run.is_complete(cell)}
    planned = [(Arm(c.bundle, c.profile, c.policy), c.workload) for c in run.cells()]
    return Summary(
        schema=SCHEMA,
        run=manifest.name,
        created=manifest.created,
        commit=manifest.commit,
        dirty=manifest.dirty,
        code=dict(analysis.code),
        complete=analysis.complete == analysis.planned,
        planned_cells=analysis.planned,
        complete_cells=analysis.complete,
        baseline=plan.baseline_policy,
        method={
            "interval": "percentile bootstrap over answers, batches or texts, widened by t(n-1) / 1.96 * sqrt(n/(n-1))",
            "accuracy": "Wilson; paired differences Bonett and Price, of two runs Newcombe",
            "confidence": CONFIDENCE,
            "resamples": resamples,
            "seed": plan.seed,
        },
        arms=[
            _arm(analysis, arm, {w: planned.count((arm, w)) for a, w in planned if a == arm}, resamples)
            for arm in dict.fromkeys(arm for arm, _ in planned_in_order(run))
        ],
        links=link_errors(analysis.links),
        probes=link_probes(analysis.probes),
        logger=_logger(analysis),
        failures=failures,
        gaps=gaps,
        without_result={f["cell"]: f"{f['what']}: {f['error']}" for f in failures if f["cell"] in missing},
        without_costs=_without_costs(run),
        conditions=conditions(plan, manifest.machine, run.events(), analysis.conditions),
    )


def planned_in_order(run: RunDir) -> list[tuple[Arm, str]]:
    """All arms and workloads in the order of the plan, with the baseline first."""
    plan = run.plan
    return [
        (Arm(bundle, profile, policy), workload.name)
        for bundle in plan.bundles
        for profile in plan.profile_names
        for policy in sorted(plan.policies_of(bundle), key=lambda policy: policy != plan.baseline_policy)
        for workload in plan.workloads
    ]


def encode(summary: Summary) -> bytes:
    """The summary as indented JSON."""
    return msgspec.json.format(msgspec.json.encode(summary), indent=1) + b"\n"


def _arm(analysis: Analysis, arm: Arm, planned: dict[str, int], resamples: int) -> ArmResult:
    plan = analysis.run.plan
    is_baseline = arm.policy == plan.baseline_policy
    mine = analysis.units.get(arm, {})
    theirs = {} if is_baseline else analysis.units.get(arm._replace(policy=plan.baseline_policy), {})
    return ArmResult(
        policy=arm.policy,
        profile=arm.profile,
        bundle=arm.bundle,
        baseline=is_baseline,
        workloads={
            name: _workload(analysis, name, mine.get(name, WorkloadUnits()), theirs.get(name), cells, resamples)
            for name, cells in planned.items()
        },
    )


def _workload(
    analysis: Analysis, name: str, units: WorkloadUnits, baseline: WorkloadUnits | None, planned: int, resamples: int
) -> WorkloadResult:
    workload, seed = analysis.run.plan.workload(name), analysis.run.plan.seed
    kind = kind_of(workload)
    metrics: dict[str, Interval] = {}
    against: dict[str, Against] = {}
    theirs = dict(metrics_of(baseline, kind, workload.where)) if baseline else {}
    for metric, mine in metrics_of(units, kind, workload.where):
        if (measure := metric.make(mine)) and (found := measured(measure, seed=seed, resamples=resamples)):
            metrics[metric.name] = found
            if metric in theirs and (compared := _compare(metric, mine, theirs[metric], seed, resamples)):
                against[metric.name] = compared
    gained = lost = None
    if baseline:
        mine, other = paired(units.steps, baseline.steps)
        if kind == "generate" and len(mine):
            same = measured(same_tokens(mine, other), seed=seed, resamples=resamples)
            metrics |= {SAME_TOKENS.name: same} if same else {}
        if isinstance(workload, Items):
            mine, other = paired(units.items, baseline.items)
            change = mine.sum("right") / mine.sum("items") - other.sum("right") / other.sum("items")
            gained, lost = int((change > 0).sum()), int((change < 0).sum())
    return WorkloadResult(
        kind=kind,
        where=workload.where,
        planned=planned,
        cells=units.cells,
        metrics=metrics,
        against_baseline=against,
        items_gained=gained,
        items_lost=lost,
    )


def _compare(metric: Metric, units: Units, baseline: Units, seed: int, resamples: int) -> Against | None:
    mine, theirs = (metric.make(some) for some in paired(units, baseline))
    if mine is None or theirs is None:
        return None
    return Against(
        difference=difference(mine, theirs, seed=seed, resamples=resamples),
        ratio=ratio(mine, theirs, seed=seed, resamples=resamples),
    )


def paired(units: Units, baseline: Units) -> tuple[Units, Units]:
    """The units that both arms have, in the same order."""
    keys = sorted({*units.keys} & {*baseline.keys})
    return units.only(keys), baseline.only(keys)


def _without_costs(run: RunDir) -> list[str]:
    names = {cell.id: str(cell) for cell in run.cells() if run.is_complete(cell)}
    started = [event["cell"] for event in run.events() if event["event"] == "no_measured_costs"]
    return [names[cell] for cell in dict.fromkeys(started) if cell in names]


def _logger(analysis: Analysis) -> LoggerCost | None:
    cost = analysis.logger
    if not cost.tokens or not cost.total_ns:
        return None
    return LoggerCost(
        log_us_per_token=cost.log_ns / cost.tokens / 1e3,
        share=cost.log_ns / cost.total_ns,
        write_s=cost.write_ns / 1e9,
    )
