"""The model's own routing, which ignores links."""

from typing import Annotated

from msgspec import Meta, Struct

from bs_coordinator.selection.forecast import LayerForecast
from bs_coordinator.selection.routing import Routing, top_choice
from wire.tensors import Array

Experts = Annotated[int, Meta(ge=1)]
"""Number of experts that a token asks; in a model with fewer, it asks all."""


class TopK(Struct, frozen=True, forbid_unknown_fields=True):
    """Choose each token's `k` first experts; with the model's own `k`, exactly what the model chooses.

    Source: "Mixtral of Experts", arXiv 2401.04088, section 2.1.
    """

    k: Experts

    def select(self, routing: Routing, forecast: LayerForecast) -> Array:
        """Gate weights, as `Policy.select` defines them."""
        return top_choice(routing, self.k)
