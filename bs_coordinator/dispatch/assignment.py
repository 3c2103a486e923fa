"""Which holder of an expert is asked for it. Pure."""

from collections.abc import Mapping, Sequence

HYSTERESIS = 0.25
"""How much faster another holder must be predicted before an expert moves to it: estimates wobble, and what a node has
just computed lies in its caches."""


def assign(
    holders: Sequence[Sequence[str]], cost_s: Mapping[str, float], previous: Sequence[str | None] | None = None
) -> list[str | None]:
    """A holder for each of a layer's experts, so that no node is asked for much more than its speed allows.

    Experts with the fewest holders choose first; each takes the holder that would be done first with what it has
    got so far. Those that stay with their previous holder are settled before all others.

    Args:
        holders: by expert, the nodes that may be asked, best first where nothing else decides.
        cost_s: predicted time of one hidden state, by node.
        previous: the assignment before, if any.

    Returns:
        By expert a node, or None where `holders` is empty.
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
