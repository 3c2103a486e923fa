"""Tokens choose among plans (small sets of experts), weighing time against loss at a fixed price.

The time of a plan depends on what the other tokens choose, not on the token; the policy defines what a token loses by
it. For one token, all plans are tried. For several, the time of a layer, which is that of its slowest node, is
replaced by a weighted mean over nodes: then each token can choose independently. The weights for which the mean equals
the slowest node's time (Lagrange multipliers) are approached by giving late nodes more weight (Arora, Hazan and Kale,
"The Multiplicative Weights Update Method", 2012, section 3.3).
"""

from functools import lru_cache
from itertools import combinations, product
from math import comb
from typing import Annotated

import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from bs_coordinator.selection.demand import Chosen
from bs_coordinator.selection.forecast import Float, LayerForecast

MAX_PLANS = 4096
"""Most plans that all tokens share."""
MAX_OWN_PLANS = 512
"""Most plans of each token, where tokens have their own."""
Price = Annotated[float, Meta(ge=1e-6, le=1e6)]
"""Price of losing everything, in units of top-k's time."""
# The best of a few that were tried on real gates, from 4 to 500 tokens; 200 iterations are less than 1 % better.
_ITERATIONS = 20
_STEP, _STEP_ITERATIONS = 0.8, 6


class Plans:
    """Sets of experts that tokens choose among. Hashed by identity, so results can be cached per instance.

    Attributes:
        members: float64 [plans, experts], 1 where a plan asks an expert, else 0; no row is empty.
        slots: intp [plans, most experts of a plan], each plan's experts; the number of experts stands for none.
    """

    def __init__(self, members: Float) -> None:
        self.members = members
        self._sizes: Float = members.sum(axis=1)
        slots = np.where(members > 0, np.arange(members.shape[1]), members.shape[1])
        self.slots: NDArray[np.intp] = np.sort(slots, axis=1)[:, : int(self._sizes.max())]

    def index_of(self, sets: Chosen) -> NDArray[np.intp]:
        """The index of the plan that each set of experts is, intp [tokens].

        Args:
            sets: bool [tokens, experts], each equal to one of the plans.
        """
        # Twice the common experts minus the plan's size is largest where the plan is the set.
        found: NDArray[np.intp] = (2.0 * sets @ self.members.T - self._sizes).argmax(axis=1)
        return found


@lru_cache(maxsize=64)
def count_subsets(experts: int, k: int) -> int:
    """The number of sets of 1 to `k` of these experts."""
    return sum(comb(experts, size) for size in range(1, k + 1))


@lru_cache(maxsize=64)
def most_candidates(experts: int, k: int) -> int:
    """The number of experts of which a token compares all sets of up to `k`: as `MAX_OWN_PLANS` allows, at least k."""
    return next((n for n in range(experts, k, -1) if count_subsets(n, k) <= MAX_OWN_PLANS), min(k, experts))


@lru_cache(maxsize=8)
def subsets(experts: int, k: int) -> Plans:
    """All sets of 1 to `k` experts, smaller ones first."""
    rows: list[tuple[int, ...]] = []
    for size in range(1, min(k, experts) + 1):
        rows += combinations(range(experts), size)
    members = np.zeros((len(rows), experts))
    for i, row in enumerate(rows):
        members[i, row] = 1
    return Plans(members)


@lru_cache(maxsize=8)
def substitutions(experts: int, k: int) -> tuple[NDArray[np.intp], Plans]:
    """All ways to fill `k` slots with an expert or with none, except leaving all slots empty.

    Returns:
        intp [plans, k], an expert's index or, for an empty slot, `experts`; and the sets of experts that these are.
    """
    slots = np.array(list(product(range(experts + 1), repeat=k))[:-1], np.intp)
    slots.flags.writeable = False
    members = np.zeros((len(slots), experts + 1))
    members[np.arange(len(slots))[:, None], slots] = 1
    return slots, Plans(members[:, :-1].copy())


def choose_plans(
    plans: Plans, loss: Float, top: NDArray[np.intp], price: float, forecast: LayerForecast, *, alone: bool = False
) -> NDArray[np.intp]:
    """Choose a plan for each token that makes T / T_top + `price` · mean loss small, where T is the layer's time.

    Args:
        plans: to choose among.
        loss: float64 [tokens, plans], at least 0, infinite for a plan that a token must not choose.
        top: intp [tokens], the plan that is top-k's choice. Its loss counts as zero and its time is T_top. All tokens
            keep it if nothing better is found, so T is never above T_top.
        price: above 0, so of equally fast plans the one with the least loss is chosen; of equal plans, the first.
        forecast: predicted costs of the layer.
        alone: choose for each token as if it were the only one.

    Returns:
        intp [tokens], the index of each token's plan.
    """
    if alone or len(loss) == 1:
        time_s = _alone_s(plans, forecast)
        best: NDArray[np.intp] = (time_s / time_s[top, None] + _priced(loss, top, price)).argmin(axis=1)
        return best
    return _choose_together(_Load(plans, forecast), _priced(loss, top, price / len(loss)), top)


def choose_own_plans(
    slots: NDArray[np.intp],
    held: Float,
    loss: Float,
    top: NDArray[np.intp],
    price: float,
    forecast: LayerForecast,
    *,
    alone: bool = False,
) -> NDArray[np.intp]:
    """Choose a plan for each token among plans of its own, as `choose_plans` does among shared ones.

    Args:
        slots: intp [tokens, plans, slots], the experts of each plan; the number of experts stands for none.
        held: float64 [tokens, plans, nodes], number of experts that a plan asks of a node.
        loss, top, price, forecast, alone: as for `choose_plans`.
    """
    load = _OwnLoad(slots, held, forecast)
    if len(loss) > 1 and not alone:
        return _choose_together(load, _priced(loss, top, price / len(loss)), top)
    time_s = load.layer_s(load.uses, load.busy_s(load.uses, load.held))
    top_s = time_s[np.arange(len(top)), top][:, None]
    best: NDArray[np.intp] = (time_s / top_s + _priced(loss, top, price)).argmin(axis=1)
    return best


def count_held(slots: NDArray[np.intp], forecast: LayerForecast) -> Float:
    """float64 [tokens, plans, nodes], number of experts that a plan asks of a node, from `slots` of `choose_own_plans`.

    An expert that fills several slots counts once.
    """
    slots = np.sort(slots, axis=2)
    slots[:, :, 1:][slots[:, :, 1:] == slots[:, :, :-1]] = len(forecast.holder)
    nodes = len(forecast.fixed_s)
    on_node = np.vstack([forecast.node_map(), np.zeros((1, nodes))])
    held = np.zeros((*slots.shape[:2], nodes))
    for slot in range(slots.shape[2]):
        held += on_node[slots[:, :, slot]]
    return held


def _priced(loss: Float, top: NDArray[np.intp], price: float) -> Float:
    scaled = price * loss
    scaled[np.arange(len(loss)), top] = 0
    return scaled


@lru_cache(maxsize=2)
def _alone_s(plans: Plans, forecast: LayerForecast) -> Float:
    """float64 [plans], time of the layer for a single token. Cached, as tokens may come one after the other."""
    load = _Load(plans, forecast)
    return load.layer_s(load.uses, load.busy_s(load.uses, load.held))


def _choose_together(load: "_Load", loss: Float, top: NDArray[np.intp]) -> NDArray[np.intp]:
    """Choose plans for several tokens.

    Args:
        load: what the plans demand of the nodes.
        loss: float64 [tokens, plans], priced, in units of top-k's time.
        top: intp [tokens], top-k's plans.
    """
    tokens = np.arange(len(loss))
    rows, experts = load.asked(top)
    top_s = load.layer_s(rows, load.busy_s(rows, experts))
    best, smallest = top, 1.0
    # Each node's time per row, with the time for requests and experts spread over its rows.
    row_s = load.busy_s(np.maximum(rows, 1), np.maximum(experts, 1)) / np.maximum(rows, 1) / top_s
    air = load.air_s / top_s
    late = np.full(len(row_s), 1.0 / len(row_s))
    for iteration in range(_ITERATIONS):
        chosen = (loss + load.uses @ (late * row_s + air)).argmin(axis=1)
        rows, experts = load.asked(chosen)
        busy_s = load.busy_s(rows, experts)
        total = float(load.layer_s(rows, busy_s) / top_s + loss[tokens, chosen].sum())
        if total < smallest:
            best, smallest = chosen, total
        late *= np.exp(_STEP / (1 + iteration / _STEP_ITERATIONS) * (busy_s / busy_s.max() - 1))
        late /= late.sum()
    return best


class _Load:
    """What plans demand of nodes.

    Attributes:
        held: float64 [plans, nodes] or [tokens, plans, nodes], number of experts that a plan asks of a node.
        uses: of the same shape, 1 where a plan asks any expert of a node.
        air_s: float64 [nodes], air time of a row if all links share a channel, else 0.
    """

    def __init__(self, plans: Plans, forecast: LayerForecast) -> None:
        self._members = plans.members
        self._take(plans.members @ forecast.node_map().astype(np.float64), forecast)

    def _take(self, held: Float, forecast: LayerForecast) -> None:
        self._forecast = forecast
        self._on_node: Float = forecast.node_map().astype(np.float64)
        self.held = held
        self.uses: Float = (held > 0).astype(np.float64)
        self.air_s: Float = forecast.row_air_s if forecast.shared_air else np.zeros_like(forecast.row_air_s)

    def asked(self, chosen: NDArray[np.intp]) -> tuple[Float, Float]:
        """Rows and distinct experts that each node is asked for, float64 [nodes]."""
        counts = np.bincount(chosen, minlength=len(self._members))
        return counts @ self.uses, ((counts > 0) @ self._members > 0) @ self._on_node

    def busy_s(self, rows: Float, experts: Float) -> Float:
        """float64 [..., nodes], each node's time, without transfers on shared air."""
        return self._forecast.node_s(rows, experts) - rows * self.air_s

    def layer_s(self, rows: Float, busy_s: Float) -> Float:
        """float64 [...], time until the last node has answered, as `LayerForecast.layer_s` computes it.

        Args:
            rows: float64 [..., nodes].
            busy_s: float64 [..., nodes], for these rows, from `busy_s`.
        """
        time_s: Float = busy_s.max(axis=-1) + rows @ self.air_s
        return time_s


class _OwnLoad(_Load):
    """What plans demand of nodes, where each token has plans of its own."""

    def __init__(self, slots: NDArray[np.intp], held: Float, forecast: LayerForecast) -> None:
        self._slots = slots
        self._take(held, forecast)

    def asked(self, chosen: NDArray[np.intp]) -> tuple[Float, Float]:
        """Rows and distinct experts that each node is asked for, float64 [nodes]."""
        tokens = np.arange(len(chosen))
        asked = np.zeros(len(self._on_node) + 1)
        asked[self._slots[tokens, chosen]] = 1
        rows: Float = self.uses[tokens, chosen].sum(axis=0)
        return rows, asked[:-1] @ self._on_node
