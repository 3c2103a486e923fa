"""Which holder is asked for each expert. Pure."""

from collections.abc import Mapping, Sequence

HYSTERESIS = 0.25
"""How much faster another holder must be predicted before an expert moves to it: estimates vary, and a node has the
weights that it used last in its caches."""


def assign(
    holders: Sequence[Sequence[str]], cost_s: Mapping[str, float], previous: Sequence[str | None] | None = None
) -> list[str | None]:
    """Choose a holder for each of a layer's experts, such that work is spread by speed.

    Greedy: experts with the fewest holders come first; each goes to the holder that would be done first with all that
    it was given so far, or stays with its previous holder if that is not much slower.

    Args:
        holders: by expert, the nodes that may be asked; the first one wins a tie.
        cost_s: predicted seconds for one hidden state, by node.
        previous: the assignment before, if any.

    Returns:
        By expert a node, or None if it has no holder.
    """
    chosen: list[str | None] = [None] * len(holders)
    load: dict[str, int] = {}

    def done_s(node: str) -> float:
        return (load.get(node, 0) + 1) * cost_s.get(node, 0.0)

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
