"""The interface of selection policies."""

from typing import Protocol

from bs_coordinator.selection.forecast import LayerForecast
from wire.tensors import Array


class Policy(Protocol):
    """Chooses the experts that each token is sent to. Pure: the same arguments give the same result."""

    def select(self, probabilities: Array, forecast: LayerForecast) -> Array:
        """Gate weights of one layer.

        Args:
            probabilities: float32 [tokens, experts], the gate's softmax over all experts.
            forecast: predicted costs of this layer's experts.

        Returns:
            float32 [tokens, experts], zero for an expert that is not asked. Each token asks at least one.
        """
