"""How many nodes may send messages of one kind, and how often. Pure: times come with the messages."""

import logging

log = logging.getLogger(__name__)

MOST_NODES = 1024
"""Names that are taken note of while a base station runs: everything that is kept per node is bounded by it."""
BURST = 16
PER_S = 4.0
"""Nodes send a status every 3 s and telemetry every second, and some more when they connect."""


class Admission:
    """A token bucket per node, for a limited number of nodes.

    Nodes that were seen first keep their places, so that a flood of new names does not push them out.
    """

    def __init__(self, what: str) -> None:
        """No node is known.

        Args:
            what: kind of message, for the log.
        """
        self._what = what
        self._buckets: dict[str, tuple[float, float]] = {}
        self._full = False

    def refusal(self, node: str, now_s: float) -> str:
        """Why a message is to be dropped: `nodes`, `rate`; empty if it is to be taken.

        Args:
            now_s: when it arrived, by any one clock.
        """
        left, since_s = self._buckets.get(node, (float(BURST), now_s))
        if node not in self._buckets and len(self._buckets) >= MOST_NODES:
            if not self._full:
                log.error("%d nodes have sent %s: those of further nodes are dropped", MOST_NODES, self._what)
            self._full = True
            return "nodes"
        left = min(BURST, left + PER_S * max(0.0, now_s - since_s))
        self._buckets[node] = (left - 1 if left >= 1 else left, now_s)
        return "" if left >= 1 else "rate"
