"""What a layer's router decides: the model's own choice of experts, and what other choices can be made from."""

from collections.abc import Sequence
from functools import reduce
from operator import add
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from wire.tensors import Array

ROUNDING = 1e-5
"""Sums of weights that differ from 1 by less are taken to be 1."""


class Routing(NamedTuple):
    """One layer's routing of some tokens.

    Attributes:
        weights: float32 [tokens, experts], the model's own choice with its own weights; zero elsewhere. They add up
            to 1 in some families only.
        scores: float32 [tokens, experts], above 0: the model weighs the experts that it chooses in proportion to
            these, with a factor of each token. None for a model whose rule is not known.
        order: float32 [tokens, experts]: the model chooses the largest of these. None where it is `scores`.
    """

    weights: Array
    scores: Array | None
    order: Array | None = None

    def rows(self, index: slice | NDArray[np.intp]) -> "Routing":
        """The routing of some of the tokens."""
        scores, order = (None if x is None else x[index] for x in (self.scores, self.order))
        return Routing(self.weights[index], scores, order)


def softmax_routing(probabilities: Array, k: int, *, renormalised: bool = True) -> Routing:
    """The routing of a model that weighs its `k` most probable experts by their probabilities.

    Source: "Mixtral of Experts", arXiv 2401.04088, section 2.1; without scaling: "OLMoE", arXiv 2409.02060, section 2.

    Args:
        probabilities: float32 [tokens, experts], the gate's softmax over all experts.
        renormalised: whether the weights are scaled to add up to 1 (`norm_topk_prob` in config.json).
    """
    weights = top_weights(probabilities, k)
    if not renormalised:
        weights = np.where(weights > 0, probabilities, np.float32(0))
    return Routing(weights, probabilities)


def join_routings(routings: Sequence[Routing]) -> Routing:
    """The routing of the tokens of all `routings`, one after the other; all are of the same layer."""
    scores = [r.scores for r in routings if r.scores is not None]
    order = [r.order for r in routings if r.order is not None]
    return Routing(
        np.concatenate([r.weights for r in routings]),
        np.concatenate(scores) if scores else None,
        np.concatenate(order) if order else None,
    )


def top_weights(scores: Array, k: int, order: Array | None = None) -> Array:
    """The scores of each token's `k` experts, scaled to add up to 1; zero elsewhere. float32 [tokens, experts].

    Args:
        scores: float32 [tokens, experts].
        order: float32 [tokens, experts], the `k` experts are those with the largest; None if `scores` decide. Of
            equal ones, the first count.
    """
    weights = np.zeros(scores.shape, np.float32)
    if len(scores) == 1 and order is None:
        # Decoding waits for this in every layer: the same arithmetic on plain numbers takes a fifth of the time.
        (left,) = scores.tolist()
        top = sorted(left, reverse=True)[:k]
        total = reduce(add, top)
        for probability in top:
            expert = left.index(probability)
            left[expert] = -1.0
            weights[0, expert] = probability / total
        return weights
    best = np.argsort(-(scores if order is None else order), axis=1, kind="stable")[:, :k]
    largest = np.take_along_axis(scores, best, axis=1).astype(np.float64)
    # Added one by one, in the same order as for a single row, for bitwise equal sums.
    totals = reduce(add, largest.T)
    np.put_along_axis(weights, best, largest / totals[:, None], axis=1)
    return weights


def totals(routing: Routing) -> Array:
    """What each token's own choice adds up to, float32 [tokens, 1]; exactly 1 where only rounding keeps it from 1."""
    # The sum of a few float32 is exact in float64, so it is bitwise the same in any order.
    total = routing.weights.sum(axis=1, keepdims=True, dtype=np.float64)
    total[np.abs(total - 1) < ROUNDING] = 1
    sums: Array = total.astype(np.float32)
    return sums


def scores_or_weights(routing: Routing) -> Array:
    """The scores, float32 [tokens, experts]; without scores, the model's own weights, which can still be compared."""
    return routing.weights if routing.scores is None else routing.scores
