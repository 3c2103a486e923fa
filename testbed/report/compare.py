"""Compares runs: what differed between them, and each policy's numbers run by run."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from testbed.facts import code_name
from testbed.plan.schema import Items, Perplexity
from testbed.report.numbers.analysis import Analysis, Arm, WorkloadUnits, analyse
from testbed.report.numbers.metrics import ITEM_METRICS, METRICS, Metric
from testbed.report.numbers.summary import kind_of, metrics_of, paired, planned_in_order
from testbed.report.numbers.units import Units
from testbed.report.page.contents import different_code
from testbed.report.page.document import Table
from testbed.report.page.labels import NOTHING, points_text, ratio_text, value_text
from testbed.run_directory.directory import RunDir, RunManifest
from testbed.statistics import RESAMPLES, Interval, between_runs, difference, measured, ratio

SHOWN = {
    "generate": ("token_ms", "token_p95_ms", "layer_wait_ms", "dropped_share", "bytes_per_token"),
    "choice": ("accuracy", "dropped_share", "layer_wait_ms"),
    "last-word": ("accuracy", "perplexity", "dropped_share", "layer_wait_ms"),
    "perplexity": ("perplexity", "dropped_share", "layer_wait_ms"),
}
"""Metrics to show, by kind of workload."""
_IGNORED = frozenset({"load_1min"})
"""Facts of a machine that differ between all runs."""


def compare_runs(runs: Sequence[RunDir], *, resamples: int = RESAMPLES) -> tuple[list[str], list[tuple[str, Table]]]:
    """Compare runs with the first one.

    Returns:
        The differences between the runs, a line each; and a table with a title for each workload and metric.

    Raises:
        RunDirectoryError: a cell is damaged.
    """
    analyses = [analyse(run) for run in runs]
    notes = [
        f"{run.path} is incomplete: {a.complete} of {a.planned} cells"
        for run, a in zip(runs, analyses, strict=True)
        if a.complete < a.planned
    ]
    notes += [f"{a.run.path}: {line}" for a in analyses for line in different_code(a.code)]
    for run in runs[1:]:
        notes += [f"{run.path}: {line}" for line in differences(runs[0].manifest, run.manifest)]
    return notes, list(_tables(analyses, resamples))


def differences(first: RunManifest, other: RunManifest) -> list[str]:
    """Differences between the manifests of two runs, as `what: other instead of first`."""
    lines = []
    for what, of in _ASPECTS.items():
        here, there = of(first), of(other)
        changed = [key for key in (here | there) if here.get(key) != there.get(key) and key not in _IGNORED]
        lines += [f"{what} {key}: {_short(there.get(key))} instead of {_short(here.get(key))}" for key in changed]
    return lines


def _code(manifest: RunManifest) -> dict[str, Any]:
    return {"commit": code_name(manifest.commit, manifest.dirty)}


def _bundles(manifest: RunManifest) -> dict[str, Any]:
    return {Path(b.name).name: f"{b.quantisation}, manifest {b.manifest_sha256[:12]}" for b in manifest.bundles}


_ASPECTS: dict[str, Callable[[RunManifest], dict[str, Any]]] = {
    "code": _code,
    "plan": lambda manifest: msgspec.to_builtins(manifest.plan.resolved),
    "network": lambda manifest: {"description": manifest.network},
    "bundle": _bundles,
    "data": lambda manifest: {Path(path).name: sha[:12] for path, sha in manifest.datasets.items()},
    "machine": lambda manifest: manifest.machine,
    "power": lambda manifest: {"governors": manifest.power.get("governors")},
    "version": lambda manifest: manifest.versions,
    "broker": lambda manifest: {"kind": manifest.broker},
}


def _short(value: object) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 80 else text[:77] + "…"


def _tables(analyses: Sequence[Analysis], resamples: int) -> Iterator[tuple[str, Table]]:
    """Tables per workload and metric. Arms match by name of the bundle, profile and policy, workloads by name."""
    arms: dict[tuple[Arm, str], list[WorkloadUnits]] = {}
    workloads: dict[str, list[_Work | None]] = {}
    for number, analysis in enumerate(analyses):
        for arm, name in planned_in_order(analysis.run):
            named = arm._replace(bundle=Path(arm.bundle).name)
            units = arms.setdefault((named, name), [WorkloadUnits() for _ in analyses])
            units[number] = analysis.units.get(arm, {}).get(name, units[number])
            workloads.setdefault(name, [None] * len(analyses))[number] = _work(analysis.run.manifest, name)
    draw = {"seed": analyses[0].run.plan.seed, "resamples": resamples}
    for name, works in workloads.items():
        kind = next(work.kind for work in works if work)
        for metric in (METRICS[m] for m in SHOWN[kind]):
            mine = {arm: units for (arm, workload), units in arms.items() if workload == name}
            rows = [[*arm, *_values(metric, works, units, draw)] for arm, units in mine.items()]
            rows = [row for row in rows if any(cell != NOTHING for cell in row[3:])]
            if rows:
                header = ["bundle", "profile", "policy", "run 1"]
                for run in range(2, len(analyses) + 1):
                    header += [f"run {run}", f"{run} vs. 1"]
                yield f"{name}: {metric.title}", Table(header, rows, 3)


class _Work(NamedTuple):
    """A workload of one run; with equal `data`, item k of two runs is the same item."""

    kind: str
    where: str
    data: object


def _work(manifest: RunManifest, name: str) -> _Work:
    workload = manifest.plan.workload(name)
    data: object = None
    if isinstance(workload, Items):
        data = manifest.datasets.get(workload.dataset)
    elif isinstance(workload, Perplexity):
        data = (manifest.datasets.get(workload.dataset or ""), workload.texts, workload.tokens)
    return _Work(kind_of(workload), workload.where, data)


def _values(
    metric: Metric, works: Sequence[_Work | None], units: Sequence[WorkloadUnits], draw: dict[str, int]
) -> list[str]:
    found = [_units(metric, work, some) for work, some in zip(works, units, strict=True)]
    cells = [_value(metric, found[0], draw)]
    for work, mine in zip(works[1:], found[1:], strict=True):
        same_items = metric in ITEM_METRICS and work and works[0] and work.data == works[0].data
        against = _against(metric, mine, found[0], bool(same_items), draw)
        cells += [_value(metric, mine, draw), points_text(against) if metric.points else ratio_text(against)]
    return cells


def _units(metric: Metric, work: _Work | None, units: WorkloadUnits) -> Units:
    known = dict(metrics_of(units, work.kind, work.where)) if work else {}
    return known.get(metric, Units())


def _value(metric: Metric, units: Units, draw: dict[str, int]) -> str:
    measure = metric.make(units)
    return value_text(measured(measure, **draw) if measure else None, metric)


def _against(metric: Metric, mine: Units, first: Units, same_items: bool, draw: dict[str, int]) -> Interval | None:
    """A metric against the first run's. Equal items are resampled together, answers and batches independently."""
    measures = [metric.make(units) for units in (paired(mine, first) if same_items else (mine, first))]
    if measures[0] is None or measures[1] is None:
        return None
    if same_items:
        return (difference if metric.points else ratio)(measures[0], measures[1], **draw)
    return between_runs(measures[0], measures[1], subtract=metric.points, **draw)
