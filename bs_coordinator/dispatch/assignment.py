"""Which holder is asked for each expert. Pure."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

HYSTERESIS = 0.25
"""How much faster another holder must be predicted before an expert moves to it: estimates vary, and a node has the
weights that it used last in its caches."""


class RequestCost(NamedTuple):
    """Predicted seconds of a request to a node: `fixed_s + experts · expert_s`, with one hidden state per expert.

    Attributes:
        fixed_s: of any request: round trip, decoding, encoding. A layer sends a node one request for all its experts.
        expert_s: for each expert: its hidden state there and back, and computing it.
    """

    fixed_s: float
    expert_s: float

    @classmethod
    def of(cls, one_s: float, two_s: float) -> "RequestCost":
        """From the seconds of requests for one expert and for two."""
        return cls(fixed_s=2 * one_s - two_s, expert_s=two_s - one_s)

    def seconds(self, experts: int) -> float:
        """Of a request for so many experts."""
        return self.fixed_s + experts * self.expert_s


_UNKNOWN = RequestCost(0.0, 0.0)


def assign(
    holders: Sequence[Sequence[str]], costs: Mapping[str, RequestCost], previous: Sequence[str | None] | None = None
) -> list[str | None]:
    """Choose a holder for each of a layer's experts, such that a step that asks all of them is over soon.

    Greedy: experts with the fewest holders come first; each goes to the holder that would be done first with all that
    it was given so far, or stays with its previous holder if that is not much slower.

    Args:
        holders: by expert, the nodes that may be asked; the first one wins a tie.
        costs: by node.
        previous: the assignment before, if any.

    Returns:
        By expert a node, or None if it has no holder.
    """
    chosen: list[str | None] = [None] * len(holders)
    load: dict[str, int] = {}

    def done_s(node: str) -> float:
        fixed_s, expert_s = costs.get(node, _UNKNOWN)
        return fixed_s + (load.get(node, 0) + 1) * expert_s

    for expert in sorted(range(len(holders)), key=lambda e: len(holders[e])):
        nodes = holders[expert]
        if not nodes:
            continue
        best = min(nodes, key=lambda n: (done_s(n), load.get(n, 0)))
        before = previous[expert] if previous else None
        if before in nodes and before is not None and done_s(before) <= (1 + HYSTERESIS) * done_s(best):
            best = before
        chosen[expert] = best
        load[best] = load.get(best, 0) + 1
    return chosen
