"""Choosing when some experts are unavailable: the next best ones, and which tokens are affected."""

import numpy as np
from numpy.typing import NDArray

from bs_coordinator.errors import ExpertsLostError
from bs_coordinator.selection.forecast import LayerForecast
from bs_coordinator.selection.policy import Policy
from wire.tensors import Array


def select_available(policy: Policy, probabilities: Array, forecast: LayerForecast) -> tuple[Array, NDArray[np.intp]]:
    """Let `policy` choose among the available experts.

    Returns:
        Gate weights, as `Policy.select` defines them, and the indices of the tokens, intp [n], for which the policy
        would have chosen an unavailable expert.

    Raises:
        ExpertsLostError: none of the layer's experts is available.
    """
    available = forecast.available
    wanted = policy.select(probabilities, forecast)
    if available is None:
        return wanted, np.zeros(0, np.intp)
    if not available.any():
        raise ExpertsLostError(f"none of the experts of layer {forecast.layer} is available")
    degraded = np.flatnonzero(wanted[:, ~available].any(axis=1))
    if not len(degraded):
        return wanted, degraded
    left = np.where(available, probabilities[degraded], np.float32(0))
    # If a gate gave all its weight to unavailable experts, the others are equally good.
    left += available * np.float32(1e-9)
    left /= left.sum(axis=1, keepdims=True)
    gate = wanted.copy()
    gate[degraded] = _only(policy.select(left, forecast), available)
    return gate, degraded


def _only(gate: Array, available: NDArray[np.bool_]) -> Array:
    """Remove unavailable experts from a choice: policies may move tokens to any expert."""
    kept = np.where(available, gate, np.float32(0))
    empty = ~kept.any(axis=1)
    kept[empty, int(np.flatnonzero(available)[0])] = 1
    kept /= kept.sum(axis=1, keepdims=True)
    return kept
