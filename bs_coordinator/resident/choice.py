"""Chooses the experts to keep on the base station, such that tokens wait least for the others. Pure.

A layer waits for the slowest of a token's experts, so keeping one of two saves nothing if the other one is as slow to
reach. What counts are pairs: room goes to the sets of experts, and to the layers, that hold all experts of most tokens.
"""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from wire.experts import ExpertId

Float = NDArray[np.float64]
Bool = NDArray[np.bool_]

HYSTERESIS = 0.05
"""Share of all waiting that another set must save in addition before experts are exchanged for it."""
LOST_S = 10.0
"""Seconds that a token is assumed to wait for an expert that no node holds."""
_UNSEEN = 0.5
"""Tokens that each pair starts with, so that a pair not seen yet counts a little."""
_ALL_SETS = 10
"""Up to this many experts per layer, all sets of them are compared."""


def choose_resident(
    pairs: Float, remote_s: Float, local_s: float, slots: int, *, current: Iterable[ExpertId] = ()
) -> frozenset[ExpertId]:
    """Choose the experts to keep, as many as there is room for.

    Room that saves no waiting goes to the experts with most tokens: they can still replace lost nodes.

    Args:
        pairs: float64 [layers, experts, experts], tokens that were sent to both experts, as `Traffic.pairs`.
        remote_s: float64 [layers, experts], seconds for one hidden state to the best node that holds the expert and
            back; inf where none holds it.
        local_s: seconds for one hidden state through an expert on the base station.
        slots: how many experts there is room for.
        current: the experts kept now; they stay unless another set saves clearly more.
    """
    layers, experts, _ = pairs.shape
    slots = min(slots, layers * experts)
    remote_s = np.where(np.isfinite(remote_s), remote_s, LOST_S)
    waiting = [_Waiting(_counts(pairs[layer]), remote_s[layer], local_s) for layer in range(layers)]
    best = [layer.best_sets() for layer in waiting]
    sizes = _share_out(np.array([[saved_s for _, saved_s in sets] for sets in best]), slots)
    kept = np.array([sets[size][0] for sets, size in zip(best, sizes, strict=True)])
    tokens = np.where(kept, -1.0, pairs.diagonal(axis1=1, axis2=2))
    for at in np.argsort(-tokens, axis=None, kind="stable")[: slots - kept.sum()]:
        kept.flat[at] = True
    chosen = frozenset(ExpertId(int(layer), int(expert)) for layer, expert in np.argwhere(kept))
    before = frozenset(current)
    if not before or len(before) > slots:
        return chosen

    def saved_s(ids: frozenset[ExpertId]) -> float:
        kept = np.zeros((layers, experts), np.bool_)
        kept[tuple(np.array(sorted(ids)).T)] = True
        return sum(float(w.saved_s(kept[layer][None])[0]) for layer, w in enumerate(waiting))

    worth_s = HYSTERESIS * sum(w.all_s for w in waiting)
    return chosen if saved_s(chosen) - saved_s(before) > worth_s else before


class _Waiting:
    """How long one layer's tokens wait.

    Attributes:
        all_s: seconds over all counted tokens, if no expert is kept.
    """

    def __init__(self, counts: Float, remote_s: Float, local_s: float) -> None:
        """Take the counts of `_counts` and the costs of `choose_resident` for one layer."""
        self._counts, self._remote_s, self._local_s = counts, remote_s, local_s
        self._pair_s = np.maximum.outer(remote_s, remote_s)
        self.all_s = float((counts * self._pair_s).sum())

    def saved_s(self, kept: Bool) -> Float:
        """Seconds saved by keeping each of some sets of experts: float64 [sets] for bool [sets, experts]."""
        remote_s = np.where(kept, 0.0, self._remote_s)
        local_s = np.where(kept, self._local_s, 0.0)
        computing_s = local_s[:, :, None] + local_s[:, None, :]
        one = np.arange(kept.shape[1])
        computing_s[:, one, one] = local_s
        wait_s = np.maximum(np.maximum(remote_s[:, :, None], remote_s[:, None, :]), computing_s)
        # Where computing locally takes longer, the nodes would be asked instead.
        saved: Float = (self._counts * np.maximum(0.0, self._pair_s - wait_s)).sum(axis=(1, 2))
        return saved

    def best_sets(self) -> list[tuple[Bool, float]]:
        """By size, from no expert to all: the set that saves most, and how many seconds."""
        experts = len(self._remote_s)
        if experts > _ALL_SETS:
            return self._nested_sets()
        sets = (np.arange(2**experts)[:, None] >> np.arange(experts) & 1).astype(np.bool_)
        saved_s, sizes = self.saved_s(sets), sets.sum(axis=1)
        best = []
        for size in range(experts + 1):
            of_size = np.flatnonzero(sizes == size)
            at = of_size[saved_s[of_size].argmax()]
            best.append((sets[at], float(saved_s[at])))
        return best

    def _nested_sets(self) -> list[tuple[Bool, float]]:
        """As `best_sets`, greedily: from all experts down to none, each time without the one that saves least."""
        kept = np.ones(len(self._remote_s), np.bool_)
        found = [(kept, float(self.saved_s(kept[None])[0]))]
        while kept.any():
            without = np.repeat(kept[None], kept.sum(), axis=0)
            without[np.arange(len(without)), np.flatnonzero(kept)] = False
            saved_s = self.saved_s(without)
            at = int(saved_s.argmax())
            kept = without[at]
            found.append((kept, float(saved_s[at])))
        return found[::-1]


def _counts(pairs: Float) -> Float:
    """Tokens by their two experts, float64 [experts, experts], upper triangle; on the diagonal those sent to one."""
    together = np.triu(pairs, 1)
    alone = np.maximum(0.0, pairs.diagonal() - together.sum(axis=0) - together.sum(axis=1))
    return together + np.diag(alone) + np.triu(np.full(pairs.shape, _UNSEEN), 1)


def _share_out(saved_s: Float, slots: int) -> list[int]:
    """How many experts each layer keeps, such that all together save most: exact, by dynamic programming.

    Args:
        saved_s: float64 [layers, experts + 1], seconds saved by how many experts a layer keeps.
        slots: experts in all.
    """
    layers, choices = saved_s.shape
    best = np.full(slots + 1, -np.inf)
    best[0] = 0.0
    taken = np.zeros((layers, slots + 1), np.intp)
    for layer in range(layers):
        options = np.full((choices, slots + 1), -np.inf)
        for size in range(min(choices, slots + 1)):
            options[size, size:] = best[: slots + 1 - size] + saved_s[layer, size]
        taken[layer] = options.argmax(axis=0)
        best = options.max(axis=0)
    left = int(best.argmax())
    sizes = []
    for layer in reversed(range(layers)):
        sizes.append(int(taken[layer, left]))
        left -= sizes[-1]
    return sizes[::-1]
