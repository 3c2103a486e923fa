"""Mixtral's own routing, blind to links."""

from typing import Annotated

import numpy as np
from msgspec import Meta, Struct

from bs_coordinator.forecast import LayerForecast
from wire.tensors import Array

Experts = Annotated[int, Meta(ge=1)]
"""How many experts a token asks; a model with fewer has all of them asked."""


class TopK(Struct, frozen=True, forbid_unknown_fields=True):
    """The `k` most probable experts, weights renormalised over them.

    Source: "Mixtral of Experts", arXiv 2401.04088, section 2.1.
    """

    k: Experts

    def select(self, probabilities: Array, forecast: LayerForecast) -> Array:
        """See `Policy.select`."""
        return top_weights(probabilities, self.k)


def top_weights(probabilities: Array, k: int) -> Array:
    """The k largest of each row, scaled so that they add up to 1; zero elsewhere. float32 [tokens, experts]."""
    k = min(k, probabilities.shape[1])
    weights = np.zeros_like(probabilities)
    if len(probabilities) == 1:
        # Decoding waits for this in every layer. The same arithmetic on a plain row takes a third of the time.
        row, weight = probabilities[0], weights[0]
        chosen = (-row).argpartition(k - 1)[:k]
        weight[chosen] = row[chosen]
        weight /= weight.sum()
        return weights
    best = np.argpartition(-probabilities, k - 1, axis=1)[:, :k]
    np.put_along_axis(weights, best, np.take_along_axis(probabilities, best, axis=1), axis=1)
    weights /= weights.sum(axis=1, keepdims=True)
    return weights
