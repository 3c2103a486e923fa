"""The fastest set of experts that keeps enough of the gate's weight."""

from typing import Annotated

import numpy as np
from msgspec import Meta, Struct

from bs_coordinator.forecast import LayerForecast
from bs_coordinator.selection.demand import no_slower, weights_of
from bs_coordinator.selection.plans import choose_plans, subsets
from bs_coordinator.selection.topk import Experts, top_weights
from wire.tensors import Array


class Subset(Struct, frozen=True, forbid_unknown_fields=True):
    """Of all sets of up to `k` experts with Σ p ≥ `share` · Σ p of top-k, the one that ends the layer earliest.

    Of sets that end it equally early the one with most weight is taken; the most probable expert has no privilege.
    The layer's predicted time never rises above top-k's: where it would, top-k is used.

    Source: after DES, arXiv 2503.13421, which minimises energy; docs/policies.md says what is ours.

    Attributes:
        k: largest size of a set.
        share: of top-k's probability that must remain. Relative, because top-k itself must always be allowed and
            gates differ in how flat they are; at 1 this is top-k.
    """

    k: Experts
    share: Annotated[float, Meta(ge=0, le=1)] = 0.7

    def select(self, probabilities: Array, forecast: LayerForecast) -> Array:
        """See `Policy.select`.

        Raises:
            ValueError: the model has too many experts for this `k`.
        """
        members = subsets(probabilities.shape[1], self.k)
        mass = probabilities @ members.T.astype(np.float32)
        allowed = (mass >= np.float32(self.share) * mass.max(axis=1, keepdims=True)) & (mass > 0)
        plans = choose_plans(members, allowed, mass, forecast)
        weights = weights_of(probabilities, members[plans])
        return no_slower(weights, top_weights(probabilities, self.k), forecast)
