"""The interface of selection policies."""

from typing import Protocol

from bs_coordinator.selection.forecast import LayerForecast
from bs_coordinator.selection.routing import Routing
from wire.tensors import Array


class Policy(Protocol):
    """Chooses the experts that each token is sent to. Pure: the same arguments give the same result."""

    def select(self, routing: Routing, forecast: LayerForecast) -> Array:
        """Gate weights of one layer.

        Args:
            routing: of the tokens, in this layer.
            forecast: predicted costs of this layer's experts.

        Returns:
            float32 [tokens, experts], zero for an expert that is not asked. Each token asks at least one.

        Raises:
            ValueError: the policy needs scores of all experts, and the routing has none.
        """
