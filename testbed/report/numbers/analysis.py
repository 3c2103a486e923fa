"""One pass over the cells of a run: collects the units of each policy and what else plots and tables need."""

from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from testbed.facts import code_name
from testbed.plan.schema import Generate
from testbed.report.numbers.conditions import CellConditions
from testbed.report.numbers.link_probes import count_probes
from testbed.report.numbers.units import Units, item_units, step_units
from testbed.run_directory.cell_rows import CellRows, numbers, read_cells
from testbed.run_directory.directory import RunDir


class Arm(NamedTuple):
    """What a report compares: a policy, with one bundle and link profile."""

    bundle: str
    profile: str
    policy: str


@dataclass(slots=True)
class WorkloadUnits:
    """The units of one arm and workload.

    Attributes:
        cells: number of complete cells.
        steps: answers, batches or texts, with their times.
        items: questions or texts, with their results.
    """

    cells: int = 0
    steps: Units = field(default_factory=Units)
    items: Units = field(default_factory=Units)


@dataclass(slots=True)
class Logger:
    """Time that logging took (`log_ns` over `tokens`, `write_ns`), and the token time it was part of (`total_ns`)."""

    log_ns: int = 0
    tokens: int = 0
    total_ns: int = 0
    write_ns: int = 0


@dataclass(slots=True)
class Analysis:
    """What a report needs of a run.

    Attributes:
        planned: number of cells in the plan.
        complete: number of complete cells.
        units: units by arm and workload.
        requests: number of requests by policy, expert index and node.
        links: link samples of each cell, with a column `profile`.
        probes: sums of `count_probes` over all cells.
        code: number of cells by version of the code that measured them.
        conditions: what the cells say about the conditions of the measurement.
    """

    run: RunDir
    planned: int
    complete: int = 0
    units: dict[Arm, dict[str, WorkloadUnits]] = field(default_factory=lambda: defaultdict(dict))
    requests: dict[str, Counter[tuple[int, str]]] = field(default_factory=lambda: defaultdict(Counter))
    links: list[pa.Table] = field(default_factory=list)
    probes: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    logger: Logger = field(default_factory=Logger)
    code: Counter[str] = field(default_factory=Counter)
    conditions: CellConditions = field(default_factory=CellConditions)


def analyse(run: RunDir, *, also: Callable[[CellRows], None] = lambda rows: None) -> Analysis:
    """Read all complete cells of a run.

    Args:
        also: called with each cell, so that the run is read only once.

    Raises:
        RunDirectoryError: a cell is damaged.
    """
    analysis = Analysis(run, planned=len(run.cells()))
    for rows in read_cells(run):
        also(rows)
        _take(analysis, rows)
    return analysis


def _take(analysis: Analysis, rows: CellRows) -> None:
    cell = rows.cell
    analysis.complete += 1
    analysis.conditions.add(rows)
    analysis.code[code_name(*analysis.run.code_of(rows.marker))] += 1
    workloads = analysis.units[Arm(cell.bundle, cell.profile, cell.policy)]
    mine = workloads.setdefault(cell.workload, WorkloadUnits())
    mine.cells += 1
    for key, unit in step_units(rows):
        mine.steps.add(key, unit)
    if not isinstance(rows.workload, Generate):
        for key, unit in item_units(rows):
            mine.items.add(key, unit)
    analysis.requests[cell.policy].update(_requests(rows.table("latency")))
    analysis.probes.update(count_probes(cell.profile, rows.table("link_samples"), rows.table("latency")))
    if "link_samples" in rows.tables:
        links = rows.tables["link_samples"]
        analysis.links.append(links.append_column("profile", pa.repeat(cell.profile, links.num_rows)))
    logger = analysis.logger
    logger.log_ns += rows.marker.log_ns
    logger.tokens += rows.marker.tokens
    logger.write_ns += rows.marker.write_ns
    logger.total_ns += int(np.sum(numbers(rows.table("tokens"), "total_ns")))


def _requests(latency: pa.Table) -> Counter[tuple[int, str]]:
    counts: Counter[tuple[int, str]] = Counter()
    measured = latency.filter(pc.invert(latency["warm_up"])).select(["node", "experts"])
    for row in measured.group_by(["node", "experts"]).aggregate([([], "count_all")]).to_pylist():
        for expert in row["experts"].split():
            counts[int(expert), row["node"]] += row["count_all"]
    return counts
