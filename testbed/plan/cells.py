"""The cells that a plan expands to, and the order in which they run. Pure.

A cell is one combination of repetition, bundle, link profile, workload and policy. Policies are the arms that a report
compares, so within each block of otherwise equal cells they run in an order drawn from the plan's seed.
"""

import hashlib
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from testbed.plan.schema import Plan


@dataclass(frozen=True, slots=True)
class Cell:
    """One combination of coordinates that is measured in one go.

    Attributes:
        workload: name of the workload in the plan.
    """

    repetition: int
    bundle: str
    profile: str
    workload: str
    policy: str

    @property
    def id(self) -> str:
        """12 hex digits that depend on the coordinates only."""
        coordinates = [self.repetition, self.bundle, self.profile, self.workload, self.policy]
        return hashlib.sha256(json.dumps(coordinates).encode()).hexdigest()[:12]

    def __str__(self) -> str:
        return f"#{self.repetition} {Path(self.bundle).name} {self.profile} {self.workload} {self.policy}"


MAX_CELLS = 100_000
"""Cells of a plan: a bound against mistyped numbers, far above a run of weeks."""


def count_cells(plan: Plan) -> int:
    """The number of cells in a plan, without expanding it."""
    repetitions = sum(workload.repetitions or plan.repetitions for workload in plan.workloads)
    return repetitions * len(plan.bundles) * len(plan.profile_names) * len(plan.policies)


def expand(plan: Plan) -> list[Cell]:
    """All cells in the order in which they run.

    Cells in this process use the costs measured by the cells on nodes of the same repetition, so they come after them.
    """
    return [cell for block in blocks(plan) for cell in block]


def blocks(plan: Plan) -> Iterator[list[Cell]]:
    """Groups of cells that differ only in their policy; each group has its own order of policies."""
    for repetition in range(max(w.repetitions or plan.repetitions for w in plan.workloads)):
        for where in ("distributed", "in-process"):
            for bundle in plan.bundles:
                for profile in plan.profile_names:
                    for workload in plan.workloads:
                        if workload.where == where and repetition < (workload.repetitions or plan.repetitions):
                            yield _block(plan, Cell(repetition, bundle, profile, workload.name, ""))


def _block(plan: Plan, cell: Cell) -> list[Cell]:
    policies = list(plan.policies_of(cell.bundle))
    random.Random(f"{plan.seed} {cell.id}").shuffle(policies)  # noqa: S311 (an order, not a secret)
    return [Cell(cell.repetition, cell.bundle, cell.profile, cell.workload, policy) for policy in policies]
