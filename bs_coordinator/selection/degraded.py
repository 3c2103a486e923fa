"""Choosing when some experts are unavailable: the next best ones, and which tokens are affected."""

import numpy as np
from numpy.typing import NDArray

from bs_coordinator.errors import ExpertsLostError
from bs_coordinator.selection.forecast import LayerForecast
from bs_coordinator.selection.policy import Policy
from bs_coordinator.selection.routing import Routing, top_weights, totals
from wire.tensors import Array


def select_available(policy: Policy, routing: Routing, forecast: LayerForecast) -> tuple[Array, NDArray[np.intp]]:
    """Let `policy` choose among the available experts.

    Returns:
        Gate weights, as `Policy.select` defines them, and the indices of the tokens, intp [n], for which the policy
        would have chosen an unavailable expert.

    Raises:
        ExpertsLostError: none of the layer's experts is available.
    """
    available = forecast.available
    wanted = policy.select(routing, forecast)
    if available is None:
        return wanted, np.zeros(0, np.intp)
    if not available.any():
        raise ExpertsLostError(f"none of the experts of layer {forecast.layer} is available")
    degraded = np.flatnonzero(wanted[:, ~available].any(axis=1))
    if not len(degraded):
        return wanted, degraded
    gate = wanted.copy()
    gate[degraded] = _only(policy.select(_without(routing.rows(degraded), available), forecast), available)
    return gate, degraded


def _without(routing: Routing, available: NDArray[np.bool_]) -> Routing:
    """A routing among the available experts, with the same number of experts and the same total for each token."""
    scores = routing.weights if routing.scores is None else routing.scores
    left = np.where(available, scores, np.float32(0))
    # If a gate gave all its weight to unavailable experts, the others are equally good.
    left += available * np.float32(1e-9)
    left /= left.sum(axis=1, keepdims=True)
    order = None if routing.order is None else np.where(available, routing.order, np.float32(-np.inf))
    k = int(np.count_nonzero(routing.weights, axis=1).max())
    return Routing(top_weights(left, k, order) * totals(routing), None if routing.scores is None else left, order)


def _only(gate: Array, available: NDArray[np.bool_]) -> Array:
    """Remove unavailable experts from a choice: policies may move tokens to any expert."""
    kept = np.where(available, gate, np.float32(0))
    empty = ~kept.any(axis=1)
    kept[empty, int(np.flatnonzero(available)[0])] = 1
    kept *= gate.sum(axis=1, keepdims=True) / kept.sum(axis=1, keepdims=True)
    return kept
