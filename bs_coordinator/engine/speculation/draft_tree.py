"""Which draft tokens a step tries. Pure.

They form a tree: after each token, and after the text itself, several may follow. A token comes with the probability
that it and all before it in its branch are accepted, so the likeliest token of the whole tree is added next: the
branch that is likely becomes long, and where two tokens are close, both get branches. Of all trees with as many tokens
it yields the most tokens per step (Wang et al., OPT-Tree, arXiv 2406.17276).
"""

from collections import defaultdict
from collections.abc import Callable, Mapping
from heapq import heappop, heappush
from itertools import count
from typing import NamedTuple

from bs_coordinator.engine.speculation.drafts import Choices, Draft, Path, Share


class StoppingRule(NamedTuple):
    """When a draft is large enough.

    Attributes:
        price: tokens that a second brings.
        row_s: seconds that one more row adds to the step.
        making_s: seconds that it takes to ask the drafter what follows a branch, unless it knows that.
        most: draft tokens at most.
        longest: tokens of a branch at most.
    """

    price: float
    row_s: float
    making_s: float
    most: int
    longest: int

    def asks(self, branch: Path, chance: float, *, known: bool) -> bool:
        """Whether to ask what follows a branch that comes with this probability."""
        seconds = self.row_s if known else self.row_s + self.making_s
        return len(branch) < self.longest and chance > self.price * seconds

    def takes(self, chance: float) -> bool:
        """Whether a token is worth its row, given the probability that it and all before it are accepted."""
        return chance > self.price * self.row_s


class Proposals(NamedTuple):
    """What a drafter proposes after a text.

    Attributes:
        known: what may follow a branch, best first; None if finding that takes time.
        find: the same where it is not known.
    """

    known: Callable[[Path], Choices | None]
    find: Callable[[Path], Choices]


def grow(proposals: Proposals, share: Share, rule: StoppingRule, *, branching: bool) -> Draft:
    """The likeliest tokens that are worth their cost.

    Args:
        proposals: of the drafter.
        share: probability that a token comes, if those before it do.
        rule: what is worth its cost.
        branching: whether more than one token may follow another.
    """
    chances: dict[Path, float] = {}
    choices: dict[Path, Choices] = {}
    order = count()
    # Tokens that may be added, and (False) branches of which to ask what follows: that is at most as likely.
    open_: list[tuple[float, int, Path, bool]] = [(-1.0, next(order), Path(), False)]
    while open_ and len(chances) < rule.most:
        negative, _, branch, is_token = heappop(open_)
        chance = -negative
        if is_token:
            if not rule.takes(chance):
                break
            chances[branch] = chance
            heappush(open_, (-chance, next(order), branch, False))
            continue
        known = proposals.known(branch)
        if rule.asks(branch, chance, known=known is not None):
            choices[branch] = found = proposals.find(branch) if known is None else known
            for token in found if branching else found[:1]:
                heappush(open_, (-chance * share(token), next(order), (*branch, token.id), True))
    return Draft(_by_branch(chances), choices)


def _by_branch(chances: Mapping[Path, float]) -> dict[Path, float]:
    """In the order of a depth-first walk that takes the likeliest token first."""
    # The rows of the likeliest branch then follow each other, in the step and in the cache that keeps it.
    following = defaultdict(list)
    for branch in chances:
        following[branch[:-1]].append(branch)
    walk, left = {}, following[Path()][::-1]
    while left:
        branch = left.pop()
        walk[branch] = chances[branch]
        left += following[branch][::-1]
    return walk
