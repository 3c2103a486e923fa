"""Sends tokens to smaller or other sets of experts where the saved time outweighs the lost gate weight."""

from typing import Annotated

import numpy as np
from msgspec import Meta, Struct

from bs_coordinator.selection.demand import weights_of
from bs_coordinator.selection.forecast import LayerForecast
from bs_coordinator.selection.plans import Price, choose_plans, subsets
from bs_coordinator.selection.routing import Routing, scores_of, top_choice
from bs_coordinator.selection.topk import Experts
from wire.tensors import Array


class Subset(Struct, frozen=True, forbid_unknown_fields=True):
    """Of all sets of up to `k` experts, choose those that minimise T / T_topk + `price` · mean loss.

    A token's loss is the share of top-k's probability that its set lacks: 1 - Σ p / Σ p of top-k. T is the layer's
    predicted time; it never rises above top-k's. The most probable expert may be left out like any other.

    Source: after DES, arXiv 2503.13421, which minimises energy; docs/policies.md lists our additions.

    Attributes:
        k: largest size of a set.
        price: of losing all weight, in units of top-k's time. The higher it is, the closer the choice is to top-k.
        share: share of top-k's probability that must remain in any case. It is relative because top-k itself must
            always be allowed and gates differ in how flat they are. At 1 this is top-k.
    """

    k: Experts
    price: Price = 1.5
    share: Annotated[float, Meta(ge=0, le=1)] = 0.4

    def select(self, routing: Routing, forecast: LayerForecast) -> Array:
        """Gate weights, as `Policy.select` defines them.

        Raises:
            ValueError: the model has too many experts for this `k`.
        """
        probabilities = scores_of(routing)
        plans = subsets(probabilities.shape[1], self.k)
        # In float64, because in float32 sets that differ in their weakest expert may have equal weight.
        mass = probabilities.astype(np.float64) @ plans.members.T
        most = mass.max(axis=1, keepdims=True)
        allowed = (mass >= self.share * most) & (mass > 0)
        loss = np.where(allowed, 1 - mass / most, np.inf)
        top = plans.index_of(top_choice(routing, self.k) > 0)
        chosen = choose_plans(plans, loss, top, self.price, forecast)
        return weights_of(probabilities, plans.members[chosen] > 0)
