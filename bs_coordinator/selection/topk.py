"""The model's own routing, which ignores links."""

from typing import Annotated

import numpy as np
from msgspec import Meta, Struct

from bs_coordinator.selection.candidates import find_candidates
from bs_coordinator.selection.differences import DifferenceTable
from bs_coordinator.selection.forecast import LayerForecast
from bs_coordinator.selection.one_token import asked_experts
from bs_coordinator.selection.routing import Routing
from bs_coordinator.selection.survivors import Survivors, weigh, weigh_one
from wire.tensors import Array

Experts = Annotated[int, Meta(ge=1)]
"""Number of experts that a token asks; in a model with fewer, it asks all."""


class TopK(Struct, frozen=True, forbid_unknown_fields=True):
    """Choose each token's `k` first experts; with the model's own `k`, exactly what the model chooses.

    Attributes:
        k: experts per token.
        survivors: rule for the weights where experts are dropped: with a smaller `k`, or after a loss.
        keep: table of the experts that are kept, if the model chose them, also beyond `k`.
    """

    k: Experts
    survivors: Survivors = "total"
    keep: DifferenceTable | None = None

    def select(self, routing: Routing, forecast: LayerForecast) -> Array:
        """Gate weights, as `Policy.select` defines them."""
        weights = routing.weights
        if len(weights) == 1 and forecast.available is None and np.count_nonzero(weights) == self.k:
            # Decoding waits for this in every layer.
            return weights
        shares = find_candidates(routing, forecast, self.k).shares
        if len(weights) == 1 and self.keep is None:
            return weigh_one(routing, asked_experts(shares), self.survivors)
        chosen = shares > 0
        if self.keep is not None:
            kept = self.keep.super_experts_of(forecast.layer, weights.shape[1])
            if forecast.available is not None:
                kept = kept & forecast.available
            chosen |= (weights > 0) & kept
        return weigh(routing, chosen, self.survivors)
