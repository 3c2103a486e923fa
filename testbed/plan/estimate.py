"""What a plan comes to before it runs: cells, tokens and a rough time."""

import math
from dataclasses import dataclass

from testbed.plan.cells import Cell, expand
from testbed.plan.schema import Generate, Items, Plan

TOKEN_S = 0.12
"""Time per token of the demo model on two x86-64 cores that also run eight nodes, without slow links."""
PROMPT_S = 0.6
ITEM_S = 0.2
"""Time per question with its choices, in a batch, in one process."""
TEXT_S = 1.5
START_S = 6.0


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a plan comes to.

    Attributes:
        answers: generated answers.
        tokens: most tokens of all answers.
        items: multiple-choice items.
        texts: texts whose loss is measured.
        seconds: rough time in all.
    """

    cells: int
    answers: int
    tokens: int
    items: int
    texts: int
    seconds: float


def estimate(plan: Plan) -> Estimate:
    """Add up all cells of a plan."""
    cells = expand(plan)
    answers = tokens = items = texts = 0
    for cell in cells:
        workload = plan.workload(cell.workload)
        if isinstance(workload, Generate):
            count = len(workload.prompts_of(cell.repetition))
            answers += count
            tokens += count * workload.max_tokens
        elif isinstance(workload, Items):
            items += workload.count
        else:
            # The number of domains is unknown without reading the data set; ours has twelve.
            texts += 12 * workload.texts if isinstance(workload.texts, int) else len(workload.texts)
    on_nodes = sum(plan.workload(cell.workload).where == "distributed" for cell in cells)
    seconds = (
        tokens * TOKEN_S
        + answers * PROMPT_S
        + items * ITEM_S
        + texts * TEXT_S
        + on_nodes * (PROMPT_S + plan.warm_up_tokens * TOKEN_S)
        + _system_starts(plan, cells) * START_S
        + (len(cells) - 1) * plan.pause_s
    )
    return Estimate(len(cells), answers, tokens, items, texts, seconds)


def _system_starts(plan: Plan, cells: list[Cell]) -> int:
    """How often a run starts a system."""
    needs = [(cell.bundle, plan.workload(cell.workload).where) for cell in cells]
    return sum(i == 0 or need != needs[i - 1] for i, need in enumerate(needs))


def describe(plan: Plan) -> list[str]:
    """What a plan comes to, in words."""
    e = estimate(plan)
    minutes = max(1, math.ceil(e.seconds / 60))
    kind = "emulated" if plan.emulated else "external" if plan.external else "localhost"
    return [
        f"{plan.name}: {_count(e.cells, 'cell')} over {kind}: {_count(len(plan.every_policy), 'policy', 'policies')}, "
        f"{_count(len(plan.bundles), 'bundle')}, {_count(len(plan.profile_names), 'link profile')}, "
        f"{_count(len(plan.workloads), 'workload')}, {_count(plan.repetitions, 'repetition')}",
        f"{_count(e.answers, 'answer')}, at most {_count(e.tokens, 'token')} in all, {_count(e.items, 'item')}, "
        f"{_count(e.texts, 'text')}",
        f"roughly {minutes} min with the demo model on a two-core machine, without slow links",
    ]


def _count(number: int, one: str, many: str = "") -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"
