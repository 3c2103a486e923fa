"""Sends tokens to smaller or other sets of experts where the saved time outweighs the lost gate weight."""

from typing import Annotated

import numpy as np
from msgspec import Meta, Struct
from numpy.typing import NDArray

from bs_coordinator.selection.candidates import Candidates, find_candidates
from bs_coordinator.selection.demand import Chosen
from bs_coordinator.selection.differences import DifferenceTable
from bs_coordinator.selection.forecast import Float, LayerForecast
from bs_coordinator.selection.plans import (
    MAX_PLANS,
    Plans,
    Price,
    choose_own_plans,
    choose_plans,
    count_subsets,
    most_candidates,
    subsets,
)
from bs_coordinator.selection.routing import Routing
from bs_coordinator.selection.survivors import Survivors, weigh, weigh_one
from wire.tensors import Array


class Subset(Struct, frozen=True, forbid_unknown_fields=True):
    """Of sets of up to `k` experts, choose those that minimise T / T_topk + `price` · mean loss.

    A token's loss is the share of top-k's score that its set lacks: 1 - Σ s / Σ s of top-k, at least 0. T is the
    layer's predicted time; it never rises above top-k's. The first expert may be left out like any other. With few
    experts, all sets are compared. With many, each token compares the sets of its first experts only, as many as
    `MAX_OWN_PLANS` allows: with `k` 8 those are nine experts, with `k` 10 or more its `k` experts themselves.

    Source: after DES, arXiv 2503.13421, which minimises energy; docs/policies.md lists our additions.

    Attributes:
        k: largest size of a set; above 12 there are too many sets even of a token's own experts.
        price: of losing all weight, in units of top-k's time. The higher it is, the closer the choice is to top-k.
        share: share of top-k's score that must remain in any case. It is relative because top-k itself must
            always be allowed and gates differ in how flat they are. At 1 this is top-k.
        survivors: rule for the weights of tokens that changed their experts.
        keep: table of the experts that are never dropped.
    """

    k: Annotated[int, Meta(ge=1, le=12)]
    price: Price = 1.5
    share: Annotated[float, Meta(ge=0, le=1)] = 0.4
    survivors: Survivors = "total"
    keep: DifferenceTable | None = None

    def select(self, routing: Routing, forecast: LayerForecast) -> Array:
        """Gate weights, as `Policy.select` defines them."""
        return self._select(routing, forecast, alone=len(routing.weights) == 1)

    def select_each(self, routing: Routing, forecast: LayerForecast) -> Array:
        """Gate weights, as `SelectsEach.select_each` defines them."""
        return self._select(routing, forecast, alone=True)

    def _select(self, routing: Routing, forecast: LayerForecast, *, alone: bool) -> Array:
        found = find_candidates(routing, forecast, self.k, self.keep)
        experts = found.scores.shape[1]
        k = min(self.k, experts)
        if count_subsets(experts, k) > MAX_PLANS:
            return weigh(routing, self._among_first(found, k, forecast, alone=alone), self.survivors)
        plans = subsets(experts, k)
        top = plans.index_of(found.shares > 0)
        loss = self._loss(found.scores, top, plans, found.pinned)
        chosen = choose_plans(plans, loss, top, self.price, forecast, alone=alone)
        asked = (plans.members[chosen] > 0) & (found.scores > 0)
        if len(asked) == 1:
            return weigh_one(routing, np.flatnonzero(asked[0]).tolist(), self.survivors)
        return weigh(routing, asked, self.survivors)

    def _among_first(self, found: Candidates, k: int, forecast: LayerForecast, *, alone: bool) -> Chosen:
        """Choose for each token among sets of its first experts: bool [tokens, experts]."""
        experts = found.scores.shape[1]
        plans = subsets(most_candidates(experts, k), k)
        first = np.argsort(-found.preference, axis=1, kind="stable")[:, : plans.members.shape[1]]
        scores, shares = (np.take_along_axis(x, first, axis=1) for x in (found.scores, found.shares))
        pinned = None if found.pinned is None else np.take_along_axis(found.pinned, first, axis=1)
        top = plans.index_of(shares > 0)
        loss = self._loss(scores, top, plans, pinned)
        slots = np.concatenate([first, np.full((len(first), 1), experts)], axis=1)[:, plans.slots]
        held = plans.members @ forecast.node_map().astype(np.float64)[first]
        best = choose_own_plans(slots, held, loss, top, self.price, forecast, alone=alone)
        chosen = np.zeros((len(scores), experts + 1), np.bool_)
        np.put_along_axis(chosen, slots[np.arange(len(scores)), best], True, axis=1)
        return chosen[:, :-1] & (found.scores > 0)

    def _loss(self, scores: Array, top: NDArray[np.intp], plans: Plans, pinned: Chosen | None) -> Float:
        """What tokens lose by plans, float64 [tokens, plans]; infinite for plans that are not allowed."""
        # In float64, because in float32 sets that differ in their weakest expert may have equal weight.
        mass = scores.astype(np.float64) @ plans.members.T
        most = mass[np.arange(len(mass)), top][:, None]
        allowed = (mass >= self.share * most) & (mass > 0)
        if pinned is not None:
            allowed &= (pinned.astype(np.float64) @ (1 - plans.members).T) == 0
        return np.where(allowed, np.maximum(1 - mass / most, 0), np.inf)
