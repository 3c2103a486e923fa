"""Slow experts are replaced by similar ones, or skipped, where that saves more time than it makes error."""

from typing import Annotated

import numpy as np
from msgspec import Meta, Struct

from bs_coordinator.selection.differences import DifferenceTable
from bs_coordinator.selection.forecast import LayerForecast
from bs_coordinator.selection.plans import Price, choose_plans, substitutions
from bs_coordinator.selection.topk import Experts, top_weights
from wire.tensors import Array


class Similar(Struct, frozen=True, forbid_unknown_fields=True):
    """Of all ways to replace or skip a token's top-k experts, those with which T / T_topk + `price` · mean error is
    smallest.

    Replacing expert a by b counts as a's weight × their difference, skipping a as its weight. b works with a's
    weight, for it stands in for a. T is the layer's predicted time, which so never rises above top-k's.

    Source: after SiftMoE, arXiv 2603.23888, which minimises energy; docs/policies.md says what is ours.

    Attributes:
        table: from a file that `wdmoe-testbed differences` wrote.
        k: experts per token before anything is replaced.
        price: of an error of 1, in times of top-k. The higher, the nearer to top-k.
        budget: error that no token may exceed; below 1, so that none can skip all its experts.
    """

    table: DifferenceTable
    k: Experts
    price: Price = 2.5
    budget: Annotated[float, Meta(ge=0, lt=1)] = 0.5

    @property
    def model_sha256(self) -> str:
        """The only model that this policy is for."""
        return self.table.model_sha256

    def select(self, probabilities: Array, forecast: LayerForecast) -> Array:
        """See `Policy.select`.

        Raises:
            ValueError: the table has no such layer or number of experts, or the model too many experts for this `k`.
        """
        tokens, experts = probabilities.shape
        if forecast.layer >= len(self.table.values) or self.table.values.shape[1] != experts:
            raise ValueError(
                f"the table of expert differences does not fit layer {forecast.layer} of {experts} experts"
            )
        k = min(self.k, experts)
        ways, plans = substitutions(experts, k)
        weights = top_weights(probabilities, k)
        places = np.argsort(-weights, axis=1, kind="stable")[:, :k]
        share = weights[np.arange(tokens)[:, None], places]
        difference = self.table.or_nobody[forecast.layer]
        error = np.zeros((tokens, len(ways)))
        for i in range(k):
            error += (share[:, i, None] * difference[places[:, i]])[:, ways[:, i]]
        error[error > self.budget] = np.inf
        top = places @ (experts + 1) ** np.arange(k)[::-1]  # nothing replaced; ways count in these digits
        chosen = ways[choose_plans(plans, error, top, self.price, forecast)]
        changed = np.zeros((tokens, experts + 1), np.float32)
        for i in range(k):
            changed[np.arange(tokens), chosen[:, i]] += share[:, i]
        changed = changed[:, :-1]
        changed /= changed.sum(axis=1, keepdims=True)
        return changed
