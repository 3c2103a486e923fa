"""Replaces slow experts with similar ones, or skips them, where the saved time outweighs the error."""

from functools import lru_cache, reduce
from itertools import product
from operator import add
from typing import Annotated

import numpy as np
from msgspec import Meta, Struct
from numpy.typing import NDArray

from bs_coordinator.selection.candidates import Candidates, find_candidates
from bs_coordinator.selection.differences import DifferenceTable
from bs_coordinator.selection.forecast import Float, LayerForecast
from bs_coordinator.selection.plans import MAX_PLANS, Price, choose_own_plans, choose_plans, count_held, substitutions
from bs_coordinator.selection.routing import Routing
from bs_coordinator.selection.survivors import Survivors, scale, weigh, weigh_one
from wire.tensors import Array

_OWN_WAYS = 256
"""Most ways to change a token's experts, where tokens have ways of their own."""
_FORBIDDEN = 1e9


class Similar(Struct, frozen=True, forbid_unknown_fields=True):
    """Replace or skip tokens' top-k experts in the way that minimises T / T_topk + `price` · mean error.

    The error of replacing expert a by b is a's share × their difference, and that of skipping a is a's share. A
    replacement gets the weight of the expert it stands in for. T is the layer's predicted time; it never rises above
    top-k's. With few experts, every expert may be replaced by any other. With many, only by the most similar ones: by
    the two most similar with `k` 4; with `k` from 6 to 8, experts are kept or skipped.

    Source: after SiftMoE, arXiv 2603.23888, which minimises energy; docs/policies.md lists our additions.

    Attributes:
        table: from a file that `wdmoe-testbed differences` wrote. Experts that it names are never replaced.
        k: experts per token before anything is replaced; above 8 there are too many ways.
        price: of an error of 1, in units of top-k's time. The higher it is, the closer the choice is to top-k.
        budget: error that no token may exceed; below 1, so no token can skip all its experts.
        survivors: rule for the weights of tokens that skip an expert.
    """

    table: DifferenceTable
    k: Annotated[int, Meta(ge=1, le=8)]
    price: Price = 2.5
    budget: Annotated[float, Meta(ge=0, lt=1)] = 0.5
    survivors: Survivors = "total"

    def select(self, routing: Routing, forecast: LayerForecast) -> Array:
        """Gate weights, as `Policy.select` defines them.

        Raises:
            ValueError: the table does not fit the layer or the number of experts.
        """
        return self._select(routing, forecast, alone=len(routing.weights) == 1)

    def select_each(self, routing: Routing, forecast: LayerForecast) -> Array:
        """Gate weights, as `SelectsEach.select_each` defines them.

        Raises:
            ValueError: the table does not fit the layer or the number of experts.
        """
        return self._select(routing, forecast, alone=True)

    def _select(self, routing: Routing, forecast: LayerForecast, *, alone: bool) -> Array:
        found = find_candidates(routing, forecast, self.k, self.table)
        k = min(self.k, found.shares.shape[1])
        slots = np.argsort(-found.shares, axis=1, kind="stable")[:, :k]
        if (found.shares.shape[1] + 1) ** k <= MAX_PLANS:
            chosen = self._among_all(found, slots, forecast, alone=alone)
        else:
            chosen = self._among_most_similar(found, slots, forecast, alone=alone)
        if len(slots) == 1 and chosen.tolist() == slots.tolist():
            return weigh_one(routing, slots[0, found.shares[0, slots[0]] > 0].tolist(), self.survivors)
        row = np.arange(len(slots))
        kept = np.zeros((len(slots), found.scores.shape[1] + 1), np.float32)
        for i in range(k):
            kept[row, chosen[:, i]] += found.scores[row, slots[:, i]]
        kept = kept[:, :-1]
        weights = scale(routing, kept, self.survivors)
        same = (chosen == slots).all(axis=1)
        return np.where(same[:, None], weigh(routing, found.shares > 0, self.survivors), weights)

    def _among_all(
        self, found: Candidates, slots: NDArray[np.intp], forecast: LayerForecast, *, alone: bool
    ) -> NDArray[np.intp]:
        """Choose among all ways to fill the slots: intp [tokens, k], experts, or the number of experts for none."""
        experts, k = found.shares.shape[1], slots.shape[1]
        ways, plans = substitutions(experts, k)
        # Nothing replaced: `ways` are ordered like numbers with the experts as digits.
        top = slots @ (experts + 1) ** np.arange(k)[::-1]
        cost = self._costs(found, slots, forecast)
        error = self._allowed(reduce(add, (cost[:, i, ways[:, i]] for i in range(k))))
        chosen: NDArray[np.intp] = ways[choose_plans(plans, error, top, self.price, forecast, alone=alone)]
        return chosen

    def _among_most_similar(
        self, found: Candidates, slots: NDArray[np.intp], forecast: LayerForecast, *, alone: bool
    ) -> NDArray[np.intp]:
        """The same as `_among_all`, but an expert may be replaced by its most similar ones only."""
        experts, k = found.shares.shape[1], slots.shape[1]
        others = max(0, int(_OWN_WAYS ** (1 / k) + 1e-9) - 2)
        none = np.full((*slots.shape, 1), experts)
        options = np.concatenate([slots[:, :, None], none, self.table.nearest[forecast.layer, slots, :others]], axis=2)
        which = _ways(options.shape[2], k)
        cost = np.take_along_axis(self._costs(found, slots, forecast), options, axis=2)
        error = self._allowed(reduce(add, (cost[:, i, which[:, i]] for i in range(k))))
        ways = options[:, np.arange(k), which]
        top = np.zeros(len(slots), np.intp)
        best = choose_own_plans(ways, count_held(ways, forecast), error, top, self.price, forecast, alone=alone)
        chosen: NDArray[np.intp] = ways[np.arange(len(slots)), best]
        return chosen

    def _costs(self, found: Candidates, slots: NDArray[np.intp], forecast: LayerForecast) -> Float:
        """Error of each slot by what fills it, float64 [tokens, k, experts + 1]; the last one is for none."""
        difference = self.table.or_skipped[forecast.layer]
        if forecast.available is not None:
            difference = np.where(np.append(forecast.available, True), difference, _FORBIDDEN)
        row = np.arange(len(slots))[:, None]
        cost: Float = (found.shares[row, slots, None] * difference[slots]).astype(np.float64)
        if found.pinned is not None:
            itself = slots[:, :, None] == np.arange(difference.shape[1])
            cost[found.pinned[row, slots][:, :, None] & ~itself] = _FORBIDDEN
        return cost

    def _allowed(self, error: Float) -> Float:
        error[error > self.budget] = np.inf
        return error


@lru_cache(maxsize=8)
def _ways(options: int, k: int) -> NDArray[np.intp]:
    """All ways to choose an option for each of `k` slots, intp [ways, k], except option 1 (none) for all of them.

    The first way is option 0 for all.
    """
    ways = np.array([way for way in product(range(options), repeat=k) if any(x != 1 for x in way)], np.intp)
    ways.flags.writeable = False
    return ways
