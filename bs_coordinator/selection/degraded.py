"""Choosing when some experts can't be had: the next best ones, and which tokens were hurt."""

import numpy as np
from numpy.typing import NDArray

from bs_coordinator.errors import ExpertsLostError
from bs_coordinator.selection.forecast import LayerForecast
from bs_coordinator.selection.policy import Policy
from wire.tensors import Array


def select_available(policy: Policy, probabilities: Array, forecast: LayerForecast) -> tuple[Array, NDArray[np.intp]]:
    """What `policy` chooses among the experts that can be had.

    Returns:
        Gate weights as `Policy.select`, and the tokens [n] for which it would otherwise have chosen others.

    Raises:
        ExpertsLostError: none of the layer's experts can be had.
    """
    available = forecast.available
    wanted = policy.select(probabilities, forecast)
    if available is None:
        return wanted, np.zeros(0, np.intp)
    if not available.any():
        raise ExpertsLostError(f"none of the experts of layer {forecast.layer} can be had")
    degraded = np.flatnonzero(wanted[:, ~available].any(axis=1))
    if not len(degraded):
        return wanted, degraded
    left = np.where(available, probabilities[degraded], np.float32(0))
    # A gate may have given everything to what is gone; any expert is then as good as another.
    left += available * np.float32(1e-9)
    left /= left.sum(axis=1, keepdims=True)
    gate = wanted.copy()
    gate[degraded] = _only(policy.select(left, forecast), available)
    return gate, degraded


def _only(gate: Array, available: NDArray[np.bool_]) -> Array:
    """Policies may move tokens to any expert; here only to those that can be had."""
    kept = np.where(available, gate, np.float32(0))
    empty = ~kept.any(axis=1)
    kept[empty, int(np.flatnonzero(available)[0])] = 1
    kept /= kept.sum(axis=1, keepdims=True)
    return kept
