"""Detects that a node that joined made layers slower. Pure: fed with every layer's time, warns once per node."""

from collections import deque
from collections.abc import Iterable
from statistics import median

WINDOW = 200
"""Layers before and after a node joined that are compared: a few tokens of a large model."""
WORSE = 1.1


class JoinWatch:
    """Compares layers before and after the last change of which nodes are online."""

    def __init__(self) -> None:
        self._nodes: frozenset[str] = frozenset()
        self._before: deque[int] = deque(maxlen=WINDOW)
        self._after: list[int] = []
        self._slowest: list[str] = []
        self._joined: frozenset[str] = frozenset()

    def observe(self, nodes: Iterable[str], layer_ns: int, slowest: str) -> str:
        """Take in one layer of a one-token step; gives a warning with numbers if there is one, else an empty string.

        Args:
            nodes: the nodes online now.
            layer_ns: from the choice of experts to the sum of their outputs.
            slowest: the node that the layer waited for longest.
        """
        now = frozenset(nodes)
        if now != self._nodes:
            known, self._joined = self._nodes, now - self._nodes
            self._nodes = now
            if self._after:
                self._before.extend(self._after)
            self._after, self._slowest = [], []
            if not known or known - now:
                self._joined = frozenset()  # the first nodes, or one replaced another: nothing to compare with
        if not self._joined or len(self._before) < WINDOW:
            self._before.append(layer_ns)
            return ""
        self._after.append(layer_ns)
        self._slowest.append(slowest)
        if len(self._after) < WINDOW:
            return ""
        before_ms, after_ms = median(self._before) / 1e6, median(self._after) / 1e6
        waited = sum(node in self._joined for node in self._slowest) / WINDOW
        names = ", ".join(f"'{node}'" for node in sorted(self._joined))
        self._joined = frozenset()
        self._before.extend(self._after)
        self._after, self._slowest = [], []
        if after_ms <= WORSE * before_ms:
            return ""
        return (
            f"since {names} joined, a layer takes {after_ms:.1f} ms instead of {before_ms:.1f}; "
            f"{waited:.0%} of layers waited for it longest (see 'wdmoe-bs links')"
        )
