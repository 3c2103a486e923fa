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
        would have chosen an unavailable expert.

    Raises:
        ExpertsLostError: none of the layer's experts is available.
    """
    available = forecast.available
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
