"""Every node gets a share of the rows that suits its speed; what is too much goes elsewhere or is dropped."""

from typing import Annotated

import numpy as np
from msgspec import Meta, Struct
from numpy.typing import NDArray

from bs_coordinator.forecast import Float, LayerForecast
from bs_coordinator.selection.demand import Chosen, demand, no_slower, node_map, place, weights_of
from bs_coordinator.selection.topk import Experts, top_weights
from wire.tensors import Array


class Capacity(Struct, frozen=True, forbid_unknown_fields=True):
    """Cap each node at the rows it can answer by a common deadline; overflow goes to the next-best expert with room.

    The deadline is the one by which all nodes together could answer all rows, or what the pairs that must stay need,
    times `slack`. The layer's predicted time never rises above top-k's: where it would, top-k is used.

    Source: after arXiv 2503.05066, whose caps are equal; docs/policies.md says what is ours.

    Attributes:
        k: experts per token before anything is dropped.
        slack: factor on the deadline.
        limit: pairs with at least this share of their token's weight stay. At 0.5 and with `k` 2, that is each token's
            most probable expert.
        move: overflow may go to other experts; otherwise it is dropped.
    """

    k: Experts
    slack: Annotated[float, Meta(ge=1)] = 1.0
    limit: Annotated[float, Meta(ge=0, le=1)] = 0.5
    move: bool = True

    def select(self, probabilities: Array, forecast: LayerForecast) -> Array:
        """See `Policy.select`."""
        weights = top_weights(probabilities, self.k)
        caps = self._caps(weights, forecast)
        token, expert = np.nonzero(weights)
        share = weights[token, expert]
        # What stays comes first in its node's queue, then by weight.
        order = np.lexsort((token, -share, share < self.limit))
        token, expert, share = token[order], expert[order], share[order]
        queue = forecast.holder[expert][:, None] == np.arange(len(caps))
        place_in_queue = (queue.cumsum(axis=0) * queue).sum(axis=1)
        over = (place_in_queue > caps[forecast.holder[expert]]) & (share < self.limit)
        if not over.any():
            return weights
        chosen = weights > 0
        chosen[token[over], expert[over]] = False
        if self.move:
            room = caps - queue[~over].sum(axis=0)
            wanted = np.where(weights[token[over]] > 0, np.float32(0), probabilities[token[over]])
            moved, _ = place(wanted, forecast.holder, room)
            chosen[token[over][moved >= 0], moved[moved >= 0]] = True
        return no_slower(weights_of(probabilities, _nobody_alone(chosen, probabilities)), weights, forecast)

    def _caps(self, weights: Array, forecast: LayerForecast) -> NDArray[np.int64]:
        """int64 [nodes], rows that each node can answer by the deadline."""
        on_node = node_map(forecast)
        chosen = weights > 0
        _, experts = demand(chosen, on_node)
        kept_rows, kept_experts = demand(weights >= self.limit, on_node)
        kept_s = float(forecast.node_s(kept_rows, kept_experts).max(initial=0.0))
        ready_s = forecast.fixed_s + np.maximum(experts, 1) * forecast.expert_s
        row_s = np.maximum(forecast.row_air_s + forecast.row_compute_s, 1e-12)
        pairs = int(np.count_nonzero(chosen))
        deadline_s = self.slack * max(kept_s, fill_s(ready_s, row_s, pairs))
        return np.clip(np.floor((deadline_s - ready_s) / row_s + 1e-6), 0, pairs).astype(np.int64)


def fill_s(ready_s: Float, row_s: Float, rows: int) -> float:
    """The time by which nodes that share `rows` rows at will can all be done, if rows could be split.

    Args:
        ready_s: float64 [nodes], before a node's first row.
        row_s: float64 [nodes], per row, above 0.
    """
    order = np.argsort(ready_s)
    speed = np.cumsum(1 / row_s[order])
    head_start = np.cumsum((ready_s / row_s)[order])
    # With the first j nodes in use; one node too many, or one too few, makes it later.
    return float(((rows + head_start) / speed).min())


def _nobody_alone(chosen: Chosen, probabilities: Array) -> Chosen:
    alone = np.flatnonzero(~chosen.any(axis=1))
    chosen[alone, probabilities[alone].argmax(axis=1)] = True
    return chosen
