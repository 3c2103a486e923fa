"""One pass over a run's cells: the units of each policy, and what plots and tables need besides."""

from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from testbed.facts import code_name
from testbed.plan.schema import Generate
from testbed.report.numbers.units import Units, item_units, step_units
from testbed.run_directory.cell_rows import CellRows, numbers, read_cells
from testbed.run_directory.directory import RunDir


class Arm(NamedTuple):
    """What is compared: a policy, on the same bundle and link profile as the others of its group."""

    bundle: str
    profile: str
    policy: str


@dataclass(slots=True)
class WorkloadUnits:
    """One arm's units of one workload.

    Attributes:
        steps: answers, batches or texts, with their times.
        items: questions or texts, with what came out.
    """

    cells: int = 0
    steps: Units = field(default_factory=Units)
    items: Units = field(default_factory=Units)


@dataclass(slots=True)
class Logger:
    """What logging itself took."""

    log_ns: int = 0
    tokens: int = 0
    total_ns: int = 0
    write_ns: int = 0


@dataclass(slots=True)
class Analysis:
    """A run in memory, as far as its report needs it.

    Attributes:
        complete: cells that were read.
        units: by arm and workload.
        requests: by policy, how many requests asked a node for an expert, keyed (expert, node).
        links: the cells' `link_samples`, each with its profile.
        code: how many cells each version of the code measured.
    """

    run: RunDir
    planned: int
    complete: int = 0
    units: dict[Arm, dict[str, WorkloadUnits]] = field(default_factory=lambda: defaultdict(dict))
    requests: dict[str, Counter[tuple[int, str]]] = field(default_factory=lambda: defaultdict(Counter))
    links: list[pa.Table] = field(default_factory=list)
    logger: Logger = field(default_factory=Logger)
    code: Counter[str] = field(default_factory=Counter)


def analyse(run: RunDir, *, also: Callable[[CellRows], None] = lambda rows: None) -> Analysis:
    """Read all complete cells.

    Args:
        also: shown each of them, so that a run is read once.

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
    warm = latency.filter(pc.invert(latency["warm_up"])).select(["node", "experts"])
    for row in warm.group_by(["node", "experts"]).aggregate([([], "count_all")]).to_pylist():
        for expert in row["experts"].split():
            counts[int(expert), row["node"]] += row["count_all"]
    return counts
