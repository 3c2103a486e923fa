"""Tokens choose among plans (small sets of experts) so that the layer ends as early as possible.

A plan's cost depends on what the nodes have been asked for already, not on the token; which plans a token may
choose, and which it likes best, is the policy's business. Tokens choose in blocks, each block seeing the load of
those before it: as in list scheduling, nobody crowds onto the node that was fastest when it was idle.
"""

from functools import lru_cache
from itertools import combinations, product

import numpy as np
from numpy.typing import NDArray

from bs_coordinator.forecast import Float, LayerForecast
from bs_coordinator.selection.demand import Chosen, node_map
from wire.tensors import Array

MAX_PLANS = 4096
_BLOCKS = 16


@lru_cache(maxsize=8)
def subsets(experts: int, k: int) -> Chosen:
    """All sets of 1 to `k` experts, bool [plans, experts].

    Raises:
        ValueError: there are more than `MAX_PLANS`.
    """
    rows: list[tuple[int, ...]] = []
    for size in range(1, min(k, experts) + 1):
        rows += combinations(range(experts), size)
        _check_count(len(rows), experts, k)
    members = np.zeros((len(rows), experts), np.bool_)
    for i, row in enumerate(rows):
        members[i, row] = True
    members.flags.writeable = False
    return members


@lru_cache(maxsize=8)
def substitutions(experts: int, k: int) -> NDArray[np.intp]:
    """All ways to fill `k` places with an expert or with nobody (which is `experts`), intp [plans, k].

    Left out is the one where all places stay empty.

    Raises:
        ValueError: there are more than `MAX_PLANS`.
    """
    _check_count((experts + 1) ** k - 1, experts, k)
    plans = np.array(list(product(range(experts + 1), repeat=k))[:-1], np.intp)
    plans.flags.writeable = False
    return plans


def _check_count(count: int, experts: int, k: int) -> None:
    if count > MAX_PLANS:
        raise ValueError(f"k={k} of {experts} experts are more than {MAX_PLANS} plans to compare: choose a smaller k")


def choose_plans(members: Chosen, allowed: Chosen, liking: Array, forecast: LayerForecast) -> NDArray[np.intp]:
    """A plan for each token: of those that end the layer earliest, the one that the token likes best.

    Args:
        members: bool [plans, experts], no row empty.
        allowed: bool [tokens, plans], at least one per token.
        liking: float32 [tokens, plans]; of equals, the first plan is taken.

    Returns:
        intp [tokens], each token's plan.
    """
    load = _Load(members, forecast)
    tokens = len(allowed)
    block = -(-tokens // _BLOCKS)
    # Whatever is chosen, the layer waits for the token whose fastest plan is the slowest: until then, time is free.
    wait_s = float(np.where(allowed, load.wait_s(), np.inf).min(axis=1).max())
    chosen = np.empty(tokens, np.intp)
    for start in range(0, tokens, block):
        now = slice(start, start + block)
        cost_s = np.where(allowed[now], load.cost_s(wait_s), np.inf)
        cheapest = cost_s <= cost_s.min(axis=1, keepdims=True)
        chosen[now] = np.where(cheapest, liking[now], -np.inf).argmax(axis=1)
        if start + block < tokens:
            load.add(chosen[now])
            wait_s = max(wait_s, load.busy_s())
    return chosen


class _Load:
    """What the nodes have been asked for so far, and what each plan would add for one more token."""

    def __init__(self, members: Chosen, forecast: LayerForecast) -> None:
        self._forecast = forecast
        self._on_node = node_map(forecast)
        self._members = members.astype(np.float32)
        self._uses: Chosen = (self._members @ self._on_node) > 0
        self._rows = np.zeros(self._on_node.shape[1], np.int64)
        self._asked = np.zeros(members.shape[1], np.bool_)
        # On shared air, transfers add up and only the rest of each node's time overlaps.
        f = forecast
        self._row_s = f.row_compute_s if f.shared_air else f.row_compute_s + f.row_air_s
        self._air_s: Float | float = self._uses @ f.row_air_s if f.shared_air else 0.0

    def wait_s(self) -> Float:
        """float64 [plans], until a plan's slowest node is done with one more row; on shared air, without transfers."""
        added = (self._members * ~self._asked) @ self._on_node
        experts = self._asked.astype(np.float32) @ self._on_node + added
        f = self._forecast
        time_s = f.fixed_s + experts * f.expert_s + (self._rows + 1) * self._row_s
        wait_s: Float = np.where(self._uses, time_s, 0.0).max(axis=1)
        return wait_s

    def cost_s(self, wait_s: float) -> Float:
        """float64 [plans], time of the layer with one more token, up to what all plans share.

        Args:
            wait_s: time for which the layer waits anyway.
        """
        return np.maximum(self.wait_s(), wait_s) + self._air_s

    def busy_s(self) -> float:
        """Until the slowest node is done with what it has; on shared air, without transfers."""
        f = self._forecast
        experts = self._asked.astype(np.float32) @ self._on_node
        time_s = f.fixed_s + experts * f.expert_s + self._rows * self._row_s
        return float(np.where(self._rows > 0, time_s, 0.0).max())

    def add(self, plans: NDArray[np.intp]) -> None:
        """Take in a block's choices."""
        counts = np.bincount(plans, minlength=len(self._members))
        self._rows += counts @ self._uses
        self._asked |= self._members[counts > 0].any(axis=0)
