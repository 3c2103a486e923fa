"""Choosing when some experts are unavailable: the next best ones, and which tokens are affected."""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from bs_coordinator.errors import ExpertsLostError
from bs_coordinator.selection.forecast import LayerForecast
from bs_coordinator.selection.policy import Policy
from bs_coordinator.selection.routing import Routing
from wire.tensors import Array


def select_wanted(policy: Policy, routing: Routing, forecast: LayerForecast) -> Array:
    """Gate weights, as `Policy.select` defines them, that `policy` would choose if all experts were available."""
    return policy.select(routing, forecast if forecast.available is None else replace(forecast, available=None))


def select_available(policy: Policy, routing: Routing, forecast: LayerForecast) -> tuple[Array, NDArray[np.intp]]:
    """Let `policy` choose among the available experts.

    Returns:
        Gate weights, as `Policy.select` defines them, and the indices of the tokens, intp [n], for which the policy
        would have chosen an unavailable expert, or one that lacks slices.

    Raises:
        ExpertsLostError: none of the layer's experts is available.
    """
    available = forecast.available
    if forecast.left is not None and forecast.left.any():
        return policy.select(routing, forecast), np.arange(len(routing.weights))
    wanted = select_wanted(policy, routing, forecast)
    if available is None:
        return wanted, np.zeros(0, np.intp)
    if not available.any():
        raise ExpertsLostError(f"none of the experts of layer {forecast.layer} is available")
    degraded = np.flatnonzero(wanted[:, ~available].any(axis=1))
    if not len(degraded):
        return wanted, degraded
    gate = wanted.copy()
    gate[degraded] = policy.select(routing.rows(degraded), forecast)
    return gate, degraded


def gate_of_slices(gate: Array, left: NDArray[np.bool_] | None) -> Array:
    """The gate weights of the slices that are left of the layer's experts, float32 [tokens, experts · slices].

    Args:
        gate: float32 [tokens, experts].
        left: as of `LayerForecast`; if None, the result is `gate` itself.
    """
    return gate if left is None else np.where(left.reshape(-1), gate.repeat(left.shape[1], axis=1), np.float32(0))
