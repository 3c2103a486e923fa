"""The interface of selection policies."""

from typing import Protocol, runtime_checkable

from bs_coordinator.selection.forecast import LayerForecast
from bs_coordinator.selection.routing import Routing
from wire.tensors import Array


class Policy(Protocol):
    """Chooses the experts that each token is sent to. Pure: the same arguments give the same result."""

    def select(self, routing: Routing, forecast: LayerForecast) -> Array:
        """Gate weights of one layer.

        Args:
            routing: of the tokens, in this layer.
            forecast: predicted costs of this layer's experts, and which of them are available.

        Returns:
            float32 [tokens, experts], zero for an expert that is not asked; not to be changed. Each token asks at
            least one expert, and none that is unavailable.
        """


@runtime_checkable
class SelectsEach(Protocol):
    """A policy that can choose for many tokens separately in one call, for evaluations of decoding."""

    def select_each(self, routing: Routing, forecast: LayerForecast) -> Array:
        """Gate weights of one layer, where each token is selected for as if it were the only one of its step.

        Args:
            routing: of the tokens, in this layer.
            forecast: predicted costs of this layer's experts, and which of them are available.

        Returns:
            float32 [tokens, experts], whose rows are what `Policy.select` gives for each token alone.
        """
