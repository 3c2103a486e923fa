"""What a policy chooses from: the experts that can be asked, and those of them that the model itself prefers."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bs_coordinator.selection.demand import Chosen
from bs_coordinator.selection.differences import DifferenceTable
from bs_coordinator.selection.forecast import LayerForecast
from bs_coordinator.selection.routing import ROUNDING, Routing, scores_or_weights, top_weights, totals
from wire.tensors import Array

_TINY = 1e-30


class Candidates(NamedTuple):
    """The experts that some tokens can ask in a layer.

    Attributes:
        scores: float32 [tokens, experts], zero for unavailable experts.
        preference: float32 [tokens, experts], above zero for experts that can be asked, largest for the one that the
            model would choose first. Only its order has a meaning.
        shares: float32 [tokens, experts], the scores of each token's `k` first experts, scaled to add up to 1, and
            zero elsewhere.
        pinned: bool [tokens, experts], which of those must stay; None for none.
    """

    scores: Array
    preference: Array
    shares: Array
    pinned: Chosen | None


def find_candidates(
    routing: Routing, forecast: LayerForecast, k: int, keep: DifferenceTable | None = None
) -> Candidates:
    """What tokens can ask for, without the experts that `forecast` says are unavailable.

    Args:
        k: experts per token before anything is dropped.
        keep: table that names the experts that are never dropped.

    Raises:
        ValueError: `keep` does not fit the layer or the number of experts.
    """
    if forecast.available is not None:
        routing = _only(routing, forecast.available)
    scores = scores_or_weights(routing)
    shares = _top_shares(routing, k)
    pinned = None if keep is None else (shares > 0) & keep.super_experts_of(forecast.layer, shares.shape[1])
    if routing.order is None:
        return Candidates(scores, scores, shares, pinned)
    # Selection biases make any values possible, also negative ones: only the ranks are used.
    ranks = np.argsort(np.argsort(routing.order, axis=1, kind="stable"), axis=1) + 1
    return Candidates(scores, np.where(np.isneginf(routing.order), 0, ranks).astype(np.float32), shares, pinned)


def _top_shares(routing: Routing, k: int) -> Array:
    weights = routing.weights
    if len(weights) == 1:
        if np.count_nonzero(weights) != k:
            return top_weights(scores_or_weights(routing), k, routing.order)
        total = sum(weights[0].tolist())
        return weights if abs(total - 1) < ROUNDING else weights / totals(routing)
    own = np.count_nonzero(weights, axis=1) == k
    whole: Array = np.maximum(totals(routing), np.float32(_TINY))
    shares = weights / whole
    if own.all():
        return shares
    return np.where(own[:, None], shares, top_weights(scores_or_weights(routing), k, routing.order))


def _only(routing: Routing, available: NDArray[np.bool_]) -> Routing:
    """The routing with nothing for unavailable experts; a token that is left with nothing likes all others alike."""
    scores = np.where(available, scores_or_weights(routing), np.float32(0))
    weights = np.where(available, routing.weights, np.float32(0))
    none_left = ~scores.any(axis=1, keepdims=True)
    scores = np.where(none_left & available, np.float32(_TINY), scores)
    if routing.order is None:
        return Routing(weights, scores)
    order = np.where(available, routing.order, np.float32(-np.inf))
    # A router that chooses groups first excludes experts as well. Where only those are left, their scores decide.
    excluded = np.isneginf(order).all(axis=1, keepdims=True)
    return Routing(weights, scores, np.where(excluded & available, scores, order))
