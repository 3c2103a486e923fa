"""What a plan comes to before it is run: cells, tokens, a rough time."""

from dataclasses import dataclass

from testbed.experiment.plan import Cell, Choice, Generate, Plan, expand

TOKEN_S = 0.12
"""Of the demo model on two x86-64 cores that also run eight nodes; links come on top."""
PROMPT_S = 0.6
ITEM_S = 0.2
"""One question with its choices, in a batch, in one process."""
TEXT_S = 1.5
START_S = 6.0


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a plan comes to.

    Attributes:
        answers: of generation, at most `tokens` in all.
        items: of multiple choice.
    """

    cells: int
    answers: int
    tokens: int
    items: int
    texts: int
    seconds: float


def estimate(plan: Plan) -> Estimate:
    """Add up all cells."""
    cells = expand(plan)
    answers = tokens = items = texts = 0
    for cell in cells:
        workload = plan.workload(cell.workload)
        if isinstance(workload, Generate):
            count = len(workload.prompts_of(cell.repetition))
            answers += count
            tokens += count * workload.max_tokens
        elif isinstance(workload, Choice):
            items += workload.count
        else:
            # Without reading the data set the number of its domains is unknown; ours has twelve.
            texts += 12 * workload.texts if isinstance(workload.texts, int) else len(workload.texts)
    on_nodes = sum(plan.workload(cell.workload).where == "distributed" for cell in cells)
    seconds = (
        tokens * TOKEN_S
        + answers * PROMPT_S
        + items * ITEM_S
        + texts * TEXT_S
        + on_nodes * (PROMPT_S + plan.warm_up_tokens * TOKEN_S)
        + _sites(plan, cells) * START_S
        + (len(cells) - 1) * plan.pause_s
    )
    return Estimate(len(cells), answers, tokens, items, texts, seconds)


def _sites(plan: Plan, cells: list[Cell]) -> int:
    """How often a system must be started."""
    needs = [(cell.bundle, plan.workload(cell.workload).where) for cell in cells]
    return sum(i == 0 or need != needs[i - 1] for i, need in enumerate(needs))


def describe(plan: Plan) -> list[str]:
    """For people."""
    e = estimate(plan)
    kind = "emulated" if plan.emulated else "external" if plan.external else "localhost"
    return [
        f"{plan.name}: {_count(e.cells, 'cell')} over {kind}: {_count(len(plan.policies), 'policy', 'policies')}, "
        f"{_count(len(plan.bundles), 'bundle')}, {_count(len(plan.profile_names), 'link profile')}, "
        f"{_count(len(plan.workloads), 'workload')}, {_count(plan.repetitions, 'repetition')}",
        f"{_count(e.answers, 'answer')}, at most {_count(e.tokens, 'token')} in all, {_count(e.items, 'item')}, "
        f"{_count(e.texts, 'text')}",
        f"roughly {e.seconds / 60:.0f} min on a two-core machine with the demo model, slow links not counted",
    ]


def _count(number: int, one: str, many: str = "") -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"
