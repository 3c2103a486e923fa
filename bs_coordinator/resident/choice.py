"""Which experts to keep on the base station, so that tokens wait least for the others. Pure.

A layer waits for the slowest of a token's experts, so that keeping one of two saves nothing if the other one is as far
away as before. What counts are pairs: room goes to the sets of experts, and to the layers, in which most tokens find
all that they need.
"""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from wire.experts import ExpertId

Float = NDArray[np.float64]
Bool = NDArray[np.bool_]

HYSTERESIS = 0.05
"""Of all waiting: how much more another set must save before experts are loaded for it."""
LOST_S = 10.0
"""What a token is taken to wait for an expert that nobody else holds."""
_UNSEEN = 0.5
"""Tokens that each pair is taken to have had before any was counted."""
_ALL_SETS = 10
"""Experts of a layer up to which all sets of them are compared."""


def choose_resident(
    pairs: Float, away_s: Float, here_s: float, slots: int, *, current: Iterable[ExpertId] = ()
) -> frozenset[ExpertId]:
    """The experts to keep, as many as there is room for.

    Room that saves no waiting goes to those that are asked for most: they replace lost nodes all the same.

    Args:
        pairs: float64 [layers, experts, experts], see `Traffic.pairs`.
        away_s: float64 [layers, experts], one hidden state to the best other holder and back; inf where there is none.
        here_s: one hidden state through an expert here.
        slots: experts that there is room for.
        current: kept now; another set must save clearly more.
    """
    layers, experts, _ = pairs.shape
    slots = min(slots, layers * experts)
    away_s = np.where(np.isfinite(away_s), away_s, LOST_S)
    waiting = [_Waiting(_counts(pairs[layer]), away_s[layer], here_s) for layer in range(layers)]
    best = [layer.best_sets() for layer in waiting]
    sizes = _share_out(np.array([[saved_s for _, saved_s in sets] for sets in best]), slots)
    kept = np.array([sets[size][0] for sets, size in zip(best, sizes, strict=True)])
    asked = np.where(kept, -1.0, pairs.diagonal(axis1=1, axis2=2))
    for at in np.argsort(-asked, axis=None, kind="stable")[: slots - kept.sum()]:
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
    """One layer's.

    Attributes:
        all_s: seconds over all counted tokens, with no expert here.
    """

    def __init__(self, counts: Float, away_s: Float, here_s: float) -> None:
        """By pairs of experts as of `_counts`, and what asking them costs."""
        self._counts, self._away_s, self._here_s = counts, away_s, here_s
        self._pair_s = np.maximum.outer(away_s, away_s)
        self.all_s = float((counts * self._pair_s).sum())

    def saved_s(self, kept: Bool) -> Float:
        """By keeping experts, float64 [sets] for bool [sets, experts]."""
        away_s = np.where(kept, 0.0, self._away_s)
        here_s = np.where(kept, self._here_s, 0.0)
        computing_s = here_s[:, :, None] + here_s[:, None, :]
        one = np.arange(kept.shape[1])
        computing_s[:, one, one] = here_s
        wait_s = np.maximum(np.maximum(away_s[:, :, None], away_s[:, None, :]), computing_s)
        # Where computing here takes longer, the nodes are asked instead.
        saved: Float = (self._counts * np.maximum(0.0, self._pair_s - wait_s)).sum(axis=(1, 2))
        return saved

    def best_sets(self) -> list[tuple[Bool, float]]:
        """By size, from no expert to all: the set that saves most, and how much."""
        experts = len(self._away_s)
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
        """From all experts down to none, each time without the one that is missed least: not always the best."""
        kept = np.ones(len(self._away_s), np.bool_)
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
    """Tokens by the two experts that they were sent to, each pair once; on the diagonal those sent to one only."""
    together = np.triu(pairs, 1)
    alone = np.maximum(0.0, pairs.diagonal() - together.sum(axis=0) - together.sum(axis=1))
    return together + np.diag(alone) + np.triu(np.full(pairs.shape, _UNSEEN), 1)


def _share_out(saved_s: Float, slots: int) -> list[int]:
    """How many experts each layer keeps, so that all save most: exact, by dynamic programming.

    Args:
        saved_s: float64 [layers, experts + 1], by how many a layer keeps.
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
