"""What drafters propose."""

from collections.abc import Sequence

from bs_coordinator.engine.speculation.drafts import Drafter, DraftToken, Path


def greedy(drafter: Drafter, ids: Sequence[int], tokens: int) -> list[DraftToken]:
    """The best token after `ids`, the best one after it, and so on; fewer than `tokens` if there is no proposal."""
    found: list[DraftToken] = []
    path = Path()
    while len(found) < tokens and (choices := drafter.choices(ids, path)):
        found.append(choices[0])
        path += (choices[0].id,)
    return found
