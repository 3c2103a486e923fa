"""Replaces slow experts with similar ones, or skips them, where the saved time outweighs the error."""

from typing import Annotated

import numpy as np
from msgspec import Meta, Struct

from bs_coordinator.selection.differences import DifferenceTable
from bs_coordinator.selection.forecast import LayerForecast
from bs_coordinator.selection.plans import Price, choose_plans, substitutions
from bs_coordinator.selection.routing import Routing, top_choice
from bs_coordinator.selection.topk import Experts
from wire.tensors import Array


class Similar(Struct, frozen=True, forbid_unknown_fields=True):
    """Replace or skip tokens' top-k experts in the way that minimises T / T_topk + `price` · mean error.

    The error of replacing expert a by b is a's weight × their difference, and that of skipping a is a's weight. A
    replacement gets the weight of the expert it stands in for. T is the layer's predicted time; it never rises above
    top-k's.

    Source: after SiftMoE, arXiv 2603.23888, which minimises energy; docs/policies.md lists our additions.

    Attributes:
        table: from a file that `wdmoe-testbed differences` wrote.
        k: experts per token before anything is replaced.
        price: of an error of 1, in units of top-k's time. The higher it is, the closer the choice is to top-k.
        budget: error that no token may exceed; below 1, so no token can skip all its experts.
    """

    table: DifferenceTable
    k: Experts
    price: Price = 2.5
    budget: Annotated[float, Meta(ge=0, lt=1)] = 0.5

    @property
    def model_sha256(self) -> str:
        """Hash of the only model that this policy works with."""
        return self.table.model_sha256

    def select(self, routing: Routing, forecast: LayerForecast) -> Array:
        """Gate weights, as `Policy.select` defines them.

        Raises:
            ValueError: the table does not fit the layer or the number of experts, or the model has too many experts
                for this `k`.
        """
        tokens, experts = routing.weights.shape
        if forecast.layer >= len(self.table.values) or self.table.values.shape[1] != experts:
            raise ValueError(
                f"the table of expert differences does not fit layer {forecast.layer} of {experts} experts"
            )
        k = min(self.k, experts)
        ways, plans = substitutions(experts, k)
        weights = top_choice(routing, k)
        slots = np.argsort(-weights, axis=1, kind="stable")[:, :k]
        share = weights[np.arange(tokens)[:, None], slots]
        difference = self.table.or_skipped[forecast.layer]
        error = np.zeros((tokens, len(ways)))
        for i in range(k):
            error += (share[:, i, None] * difference[slots[:, i]])[:, ways[:, i]]
        error[error > self.budget] = np.inf
        # Nothing replaced: `ways` are ordered like numbers with the experts as digits.
        top = slots @ (experts + 1) ** np.arange(k)[::-1]
        chosen = ways[choose_plans(plans, error, top, self.price, forecast)]
        changed = np.zeros((tokens, experts + 1), np.float32)
        for i in range(k):
            changed[np.arange(tokens), chosen[:, i]] += share[:, i]
        changed = changed[:, :-1]
        changed /= changed.sum(axis=1, keepdims=True)
        return changed
