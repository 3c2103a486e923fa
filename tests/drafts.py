"""What drafters propose."""

from collections.abc import Sequence

from bs_coordinator.engine.speculation.drafts import Choices, Drafter, DraftToken, Path


def choices_of(drafter: Drafter, ids: Sequence[int], path: Path) -> Choices:
    """What may follow, whether that takes time or not."""
    known = drafter.known(ids, path)
    return drafter.find(ids, path) if known is None else known


def greedy(drafter: Drafter, ids: Sequence[int], tokens: int) -> list[DraftToken]:
    """The best token after `ids`, the best one after it, and so on; fewer than `tokens` if there is no proposal."""
    found: list[DraftToken] = []
    path = Path()
    while len(found) < tokens and (choices := choices_of(drafter, ids, path)):
        found.append(choices[0])
        path += (choices[0].id,)
    return found
