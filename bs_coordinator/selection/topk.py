"""Mixtral's own routing, which ignores links."""

from functools import reduce
from operator import add
from typing import Annotated

import numpy as np
from msgspec import Meta, Struct

from bs_coordinator.selection.forecast import LayerForecast
from wire.tensors import Array

Experts = Annotated[int, Meta(ge=1)]
"""Number of experts that a token asks; in a model with fewer, it asks all."""


class TopK(Struct, frozen=True, forbid_unknown_fields=True):
    """Choose the `k` most probable experts and renormalise their weights.

    Source: "Mixtral of Experts", arXiv 2401.04088, section 2.1.
    """

    k: Experts

    def select(self, probabilities: Array, forecast: LayerForecast) -> Array:
        """Gate weights, as `Policy.select` defines them."""
        return top_weights(probabilities, self.k)


def top_weights(probabilities: Array, k: int) -> Array:
    """The `k` largest probabilities of each row, scaled to add up to 1; zero elsewhere. float32 [tokens, experts].

    Of equal probabilities, the first ones count.
    """
    weights = np.zeros(probabilities.shape, np.float32)
    if len(probabilities) == 1:
        # Decoding waits for this in every layer: the same arithmetic on plain numbers takes a fifth of the time.
        (left,) = probabilities.tolist()
        top = sorted(left, reverse=True)[:k]
        total = reduce(add, top)
        for probability in top:
            expert = left.index(probability)
            left[expert] = -1.0
            weights[0, expert] = probability / total
        return weights
    best = np.argsort(-probabilities, axis=1, kind="stable")[:, :k]
    largest = np.take_along_axis(probabilities, best, axis=1).astype(np.float64)
    # Added one by one, in the same order as for a single row, for bitwise equal sums.
    totals = reduce(add, largest.T)
    np.put_along_axis(weights, best, largest / totals[:, None], axis=1)
    return weights
